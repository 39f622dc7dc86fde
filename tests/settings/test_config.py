"""Gin bindings name the same classes and fields as Python."""

import pytest

from llava_patch import Routing, SkipLinks
from llava_patch.core.errors import SettingError
from llava_patch.core.paths import gin_dir
from llava_patch.settings import gin_config as config
from llava_patch.settings.methods import from_dict, to_dict


def test_shipped_files_parse_to_the_papers_settings():
    assert config.read(["dpvr_lf_7b.gin"], []).routing == Routing(split=18)
    assert config.read(["skiplinks_7b.gin"], []).fusion == SkipLinks(stride=6)
    for path in gin_dir().glob("*.gin"):
        assert config.read([path.name], [])


def test_a_shipped_file_finds_what_it_includes_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gin").write_text('include "skiplinks_stage2_7b.gin"\nSkipLinks.stride = 4\n')
    read = config.read([str(tmp_path / "mine.gin")], [])
    assert read.fusion == SkipLinks(stride=4, train_tower="all") and read.flags["learning_rate"] == 1e-5
    off = config.read(["skiplinks_stage2_7b.gin"], ["Patch.fusion = None"])  # the baseline with the same flags
    assert not off.patches and off.flags == read.flags


def test_files_and_bindings_combine_as_in_the_contract():
    read = config.read(["dpvr_lf_7b.gin"], ["SkipLinks.stride = 4", "Routing.split = 16"])
    assert read.methods() == {
        "fusion": SkipLinks(stride=4),
        "routing": Routing(split=16),
        "pruning": None,
        "probe": None,
    }
    assert "Routing.side_layers = 1" in read.operative  # defaults and all
    assert "SkipLinks.stride = 4" in read.operative


def test_the_operative_config_reproduces_itself(tmp_path):
    read = config.read([], ["SkipLinks.layers = (2, 5)", "Routing.split = 3"])
    (tmp_path / "again.gin").write_text(read.operative)
    assert config.read([str(tmp_path / "again.gin")], []).methods() == read.methods()


def test_measurements_are_bound_by_the_same_names():
    read = config.read([], ["RProbe.steps = 7", "Saturation.transition_share = 0.3"])
    assert read.measurements["RProbe"].steps == 7 and read.measurements["Saturation"].transition_share == 0.3
    assert read and not read.patches
    assert config.read([], ["Routing.split = 3"]).measurements == {}


def test_the_programs_own_gin_configuration_stays_as_it_was():
    import gin

    config.read([], ["Routing.split = 3"])
    assert gin.config_str().strip() == ""
    gin.external_configurable(dict, "users_own")
    gin.bind_parameter("users_own.x", 5)
    before = gin.config_str()
    assert config.read([], ["Routing.split = 3"]).routing == Routing(split=3)
    assert gin.config_str() == before
    with pytest.raises(SettingError):
        config.read([], ["Routing.splt = 3"])
    assert gin.config_str() == before


def test_an_explicit_none_switches_a_shipped_files_method_off():
    assert config.read(["dpvr_lf_7b.gin"], ["Patch.routing = None"]).routing is None


def test_an_explicit_none_is_a_configuration_of_its_own():
    """The baseline of a sweep, which its runs must take although nothing is patched."""
    off = config.read([], ['SkipLinks.train_tower = "all"', "Patch.fusion = None"])
    assert off and not off.patches and off.off == ("fusion",)
    assert not config.read([], [])
    assert config.read([], ["Routing.split = 3"]).off == ()


def test_macros_work():
    assert config.read([], ["depth = 5", "Routing.split = %depth"]).routing == Routing(split=5)


@pytest.mark.parametrize(
    ("files", "params", "message"),
    [
        (["no_such.gin"], [], "no_such.gin: no such gin file"),
        (["dpvr_lf_7.gin"], [], "did you mean dpvr_lf_7b.gin"),
        ([], ["Routng.split = 3"], "Did you mean Routing"),
        ([], ["Routing.splt = 3"], "has no setting splt"),
        ([], ["Routing.split = -1"], "^Routing.split = -1: expected an integer >= 0$"),
        ([], ["Routing.split ="], "Routing.split"),
        ([], ["Patch.fusion = @Routng()"], "Routng"),
        ([], ['Routing.variant = "pc"', "Routing.fusion_layers = 2"], "pc shows the image to every deep layer"),
        ([], ['Routing.variant = "nope"'], "expected one of lf"),
        ([], ["Routing.freeze = 3"], "Routing.freeze"),
        ([], ["Routing.split = 3", "Patch.pruning = 5"], "Patch.pruning = 5: expected @FastV"),
        ([], ["Routing.split = 3", "Patch.probe = 5"], r"Patch.probe = 5: expected @AuxiliaryProbe\(\)"),
        ([], ["FastV.ratio = 1.5"], "FastV.ratio = 1.5: expected a number from 0 to 1"),
        ([], ["Patch.fusion = @Routing()"], "Patch.fusion = .*expected @SkipLinks"),
        ([], ["a/SkipLinks.stride = 3"], "scoped binding"),
        (["dpvr_lf_7b.gin"], ["split = 14"], r"split = ... sets nothing: write METHOD.setting, as in Routing.split"),
        ([], ["Routing.split = 18", "FastV = 0.5"], "as in FastV.layer = ..."),
        ([], ["Routing.splitt = 18"], "Routing has no setting splitt, it has variant, split.*did you mean split"),
        ([], ["Routing.split = auto"], 'write text as in Routing.variant = "lf"'),
        ([], ["FastV.layer = 2; FastV.ratio = 0.5"], "one binding a --gin_param"),
    ],
)
def test_bad_configuration_names_the_setting(files, params, message):
    with pytest.raises(SettingError, match=message):
        config.read(files, params)


def test_settings_survive_json():
    for settings in (SkipLinks(layers=(3, 1), detach=1, train_tower=2), Routing(split=4, freeze="none")):
        assert from_dict(to_dict(settings), "here") == settings
    with pytest.raises(SettingError, match=r"here: Routing has no setting splt"):
        from_dict({"method": "Routing", "splt": 1}, "here")
    with pytest.raises(SettingError, match="unknown method 'Rout'"):
        from_dict({"method": "Rout"}, "here")


def test_a_macro_that_is_used_may_stay():
    assert config.read([], ["s = 4", "Routing.split = %s"]).routing.split == 4
