"""What can be checked before the first run is checked there."""

from pathlib import Path

import pytest

from llava_patch.core.errors import SettingError
from llava_patch.tools.sweep.plan import make_plan, read_sweep
from llava_patch.tools.sweep.settings import Sweep


def _plan(command=("true",), seeds=(1,), **settings):
    return make_plan(Sweep(**{"gin_files": ("dpvr_lf_small.gin",), **settings}), seeds, Path("out"), list(command))


def test_every_point_times_every_seed():
    grid = {"Routing.split": (3, 5), "Routing.variant": ("lf", "pc")}
    runs = _plan(("bash", "x.sh", "--seed", "9"), grid=grid, seeds=(1, 2), gin_params=("Flags.lora_r = 3",))
    assert len(runs) == 8
    assert [(r.point["Routing.split"], r.point["Routing.variant"], r.seed) for r in runs][:3] == [
        (3, "lf", 1), (3, "lf", 2), (3, "pc", 1),
    ]  # fmt: skip
    assert runs[2].folder == Path("out/Routing.split-3_Routing.variant-pc/seed1")
    assert runs[2].command == [
        "bash", "x.sh", "--seed", "9", "--gin_file", "dpvr_lf_small.gin", "--gin_param", "Flags.lora_r = 3",
        "--gin_param", "Routing.split = 3", "--gin_param", "Routing.variant = 'pc'", "--seed", "1",
        "--output_dir", "out/Routing.split-3_Routing.variant-pc/seed1",
    ]  # fmt: skip
    assert "Routing.variant = 'pc'" in runs[2].settings and "Routing.side_layers = 1" in runs[2].settings


def test_several_grids_and_a_baseline():
    grids = [
        {"SkipLinks.stride": (6,), "SkipLinks.detach": (0, 1, 2)},
        {"SkipLinks.stride": [4], "SkipLinks.detach": (5,)},
    ]
    runs = _plan(grid=grids, baseline={"Patch.fusion": None}, gin_files=("skiplinks_stage2_7b.gin",))
    pairs = [(run.point.get("SkipLinks.stride"), run.point.get("SkipLinks.detach"), run.baseline) for run in runs]
    assert pairs == [(None, None, True), (6, 0, False), (6, 1, False), (6, 2, False), (4, 5, False)]
    assert runs[0].folder == Path("out/Patch.fusion-None/seed1")
    assert "Patch.fusion = None" in runs[0].settings and not any("SkipLinks" in line for line in runs[0].settings)
    assert "SkipLinks.detach = 2" in runs[3].settings and "Patch.fusion = @SkipLinks()" in runs[3].settings


def test_detach_is_not_swept_while_the_tower_is_frozen():
    with pytest.raises(SettingError, match=r"SkipLinks\.detach changes nothing while the vision tower is frozen"):
        _plan(grid={"SkipLinks.detach": (0, 1)}, gin_files=("skiplinks_7b.gin",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"grid": ()}, r"Sweep.grid = \{\}"),
        ({"grid": [{"Routing.split": (3,)}, {}]}, r"Sweep.grid = \{\}"),
        (
            {"grid": [{"Routing.split": (3, 5)}, {"Routing.split": (5,)}]},
            "Sweep.grid: Routing.split = 5 is there twice",
        ),
        ({"grid": {"Routing.split": (3,)}, "baseline": {"Routing.split": 3}}, "Routing.split = 3 is there twice"),
        ({"grid": {"Routing.split": (3,)}, "baseline": {}}, r"Sweep.baseline = \{\}: expected bindings with one value"),
        ({"grid": {"Routing.split": (3,)}, "scores": {"OCR": "pope/acc"}}, "Sweep.scores"),
        ({"grid": {"Routing.split": (3,)}, "scores": {"OCR": ()}}, "Sweep.scores"),
        ({"grid": {"Routing.split": (3,)}, "baseline": {"a b": 3}}, "Sweep.baseline: 'a b' is not the name"),
        ({"grid": {"Routing.split": (3, -1)}}, r"^point Routing.split = -1 of the sweep: Routing.split = -1: expected"),
        ({"grid": {"Routing.splt": (3,)}}, r"^point Routing.splt = 3 of the sweep: .*has no setting splt"),
        ({"grid": {"Routing.split": (3,)}, "gin_files": ("no.gin",)}, "no.gin: no such gin file"),
        ({"grid": {"Flags.seed": (3,)}}, "Flags.seed is bound, but a sweep sets --seed"),
        ({"grid": {"Flags.output_dir": ("x",)}}, "Flags.output_dir is bound"),
        ({"grid": {"Flags.optim": ("a b", "a-b")}}, "would share the folder Flags.optim-a-b"),
        ({"grid": {"Routing.split": (3,)}, "gin_files": ("sweep_split_7b.gin",)}, "cannot describe a sweep"),
        ({"grid": {"Routing.split": (3,)}, "command": ()}, "no training command"),
        ({"grid": {"Routing.split": (3,)}, "command": ("no-such-program",)}, "no-such-program: no such command"),
        ({}, r"Sweep.grid = \{\}"),
        ({"grid": {"Routing.split": 3}}, "expected a tuple of values"),
        ({"grid": {"Routing.split": ({},)}}, "expected numbers, strings or tuples"),
        ({"grid": {"a b": (3,)}}, "'a b' is not the name of a binding"),
        ({"grid": {"Routing.split": (3,)}, "gin_files": "a.gin"}, "Sweep.gin_files"),
    ],
)
def test_bad_sweeps(settings, message):
    with pytest.raises(SettingError, match=message):
        _plan(**settings)


@pytest.mark.parametrize("seeds", [(), (1, 1), (-1,), (1.5,), (True,)])
def test_bad_seeds(seeds):
    with pytest.raises(SettingError, match=r"Sweep.seeds"):
        Sweep(grid={"Routing.split": (3,)}, seeds=seeds)


def test_the_commands_own_gin_flags_are_part_of_every_point():
    with pytest.raises(SettingError, match=r"point Routing.split = 3 .*SkipLinks.stride = 0"):
        _plan(("true", "--gin_param", "SkipLinks.stride = 0"), grid={"Routing.split": (3,)})


def test_settings_from_the_environment_are_refused(monkeypatch):
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "SkipLinks.stride = 2")
    with pytest.raises(SettingError, match="LLAVA_PATCH_GIN_PARAM is set"):
        _plan(grid={"Routing.split": (3,)})


def test_files_that_are_no_sweep(tmp_path):
    with pytest.raises(SettingError, match="describes no sweep"):
        read_sweep("dpvr_lf_small.gin")
    path = tmp_path / "mixed.gin"
    path.write_text('Sweep.grid = {"Routing.split": (3,)}\nRouting.side_layers = 1\n')
    with pytest.raises(SettingError, match="beside Sweep's own"):
        read_sweep(str(path))
