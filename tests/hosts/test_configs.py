"""What a checkpoint's files say, whatever the host."""

import json

import pytest

from llava_patch.core.errors import CheckpointError
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import HF, HOSTS, LLAVA

CONFIGS = {
    LLAVA: {"model_type": "llava_llama", "mm_vision_tower": "tower", "mm_hidden_size": 8},
    HF: {"model_type": "llava", "text_config": {}, "vision_config": {"hidden_size": 8, "num_attention_heads": 2}},
}
NEUTRAL = (
    "decoder.layers.3.mlp.up_proj.weight", "decoder.side_branch.0.mlp.up_proj.weight", "head.weight",
    "projector.0.weight", "projector.1.bias", "stack.1.weight", "tower.embeddings.class_embedding",
    "image_newline",
)  # fmt: skip


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("name", NEUTRAL)
def test_a_written_name_is_read_back(host, name):
    files = configs.files_of(host)
    assert files.neutral(files.written(name)) == name


def test_a_single_linear_and_names_in_memory():
    llava, hf = configs.files_of(LLAVA), configs.files_of(HF)
    assert llava.written("projector.0.bias", single=True) == "model.mm_projector.bias"
    assert llava.neutral("model.mm_projector.bias") == "projector.0.bias"
    assert hf.neutral("model.language_model.norm.weight") == "decoder.norm.weight"
    assert llava.neutral("model.mm_projector.1.weight") is None  # an activation's place
    assert llava.neutral("other.weight") is None and hf.neutral("other.weight") is None


@pytest.mark.parametrize("host", HOSTS)
def test_the_host_is_the_one_that_wrote_the_config(host, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[host], "llava_patch": {"format": 1}}))
    found = configs.read(str(tmp_path))
    assert (found.host, found.config, found.record, found.base) == (host, CONFIGS[host], {"format": 1}, None)
    assert configs.files_of(host).feature_width(found.config) == 8


def test_an_adapters_own_settings_come_before_those_of_its_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[HF], "llava_patch": {"format": 1}}))
    record = {"format": 1, "form": "adapter", "base": "/below", "fingerprint": {}}
    (tmp_path / "llava_patch.json").write_text(json.dumps(record))
    found = configs.look(str(tmp_path))
    assert found.record == record and found.base == "/below"


def test_other_models_and_folders_without_a_config_are_refused(tmp_path):
    assert configs.look(str(tmp_path)).host == ""
    with pytest.raises(CheckpointError, match=r"^--base x: not a checkpoint, it has no config.json"):
        configs.read(str(tmp_path), "--base x")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="model_type = 'llama' is not a LLaVA"):
        configs.look(str(tmp_path))


@pytest.mark.parametrize(
    "host, changes, says",
    [
        (HF, {"text_config": "llama"}, "text_config = 'llama': expected an object"),
        (HF, {"text_config": {"num_hidden_layers": -1}}, "text_config: num_hidden_layers = -1: expected a positive"),
        (
            HF,
            {"text_config": {"num_hidden_layers": True}},
            "text_config: num_hidden_layers = True: expected an integer",
        ),
        (HF, {"vision_config": {"hidden_size": "x"}}, "vision_config: hidden_size = 'x': expected an integer"),
        (HF, {"vision_feature_layer": "x"}, "vision_feature_layer = 'x': expected an integer or a list"),
        (HF, {"llava_patch": [1]}, r"its llava_patch settings are \[1\], expected an object"),
        (LLAVA, {"mm_vision_tower": 3}, "mm_vision_tower = 3: expected text"),
        (LLAVA, {"mm_vision_tower": ""}, "mm_vision_tower = '': expected the folder or hub name"),
        (LLAVA, {"mm_hidden_size": "8"}, "mm_hidden_size = '8': expected an integer"),
        (LLAVA, {"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a positive integer"),
        (LLAVA, {"mm_projector_type": []}, r"mm_projector_type = \[\]: expected text"),
        (LLAVA, {"model_type": ["llava"]}, r"model_type = \['llava'\] is not a LLaVA"),
    ],
)
def test_a_field_of_another_kind_is_named_with_its_file(host, changes, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS[host], **changes}))
    with pytest.raises(CheckpointError, match=rf"config\.json: {says}"):
        configs.read(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "null", '"x"', "", "{", "[" * 100_000, "1" * 5000])
def test_a_config_that_holds_no_object_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON .*copy or download this file again"):
        configs.look(str(tmp_path))


def test_what_transformers_makes_nothing_of_is_one_error():
    config = {**CONFIGS[HF], "text_config": {"model_type": "nosuch"}}
    with pytest.raises(CheckpointError, match=r"config\.json: nothing can be made of its values .*nosuch"):
        configs.skeleton(config, HF)
