"""LLaVA-NeXT's unmodified train.py, with our flags behind its own; where LLAVA_PATCH_LLAVA_TREE names its checkout."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPImageProcessor

from tests.support import llava_tree, tiny_train
from tests.support.paths import ROOT

REAL = llava_tree.is_next()
MISSING = [name for name in ("tyro", "deepspeed") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(not REAL, reason="LLAVA_PATCH_LLAVA_TREE names no checkout of LLaVA-NeXT"),
    pytest.mark.skipif(bool(MISSING), reason=f"its train.py needs {', '.join(MISSING)}"),
]
PARTS = "mm_vision_tower,mm_mlp_adapter,mm_language_model"
ANYRES = {
    "image_aspect_ratio": "anyres_max_9", "image_grid_pinpoints": "[[56,112],[112,56],[112,112]]",
    "mm_patch_merge_type": "spatial_unpad", "attn_implementation": "sdpa", "bf16": True,
    "pretrain_mm_mlp_adapter": None,
}  # fmt: skip
ONE_TILE = {"image_aspect_ratio": "pad", "attn_implementation": "sdpa", "bf16": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_train.make_data(tmp_path_factory.mktemp("next"))


def _train(data, out, *bindings, **flags):
    launcher = ROOT / "tests" / "support" / "launchers" / "cpu_train.py"
    ours = [word for binding in bindings for word in ("--gin_param", binding)]
    return tiny_train.run([launcher, tiny_train.TRAIN, *tiny_train.arguments(data, 2, out, **flags), *ours])


def _tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def stock(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("stock")
    text = tiny_train.ok(_train(data, out, mm_tunable_parts=PARTS, mm_vision_tower_lr=2e-6, **ONE_TILE))
    assert "llava_patch" not in text
    return out


def test_lf_trains_the_side_branch_alone_whatever_parts_are_tunable(data, tmp_path):
    """On tiles, of which anyres_max may mix patches; from 5.0 on its own cutting of tiles cannot read a processor."""
    images = ANYRES if isinstance(CLIPImageProcessor().size, dict) else ONE_TILE
    tiny_train.ok(_train(data, tmp_path, "Routing.split = 3", mm_tunable_parts=PARTS, **images))
    trained = _tensors(tmp_path)
    base = {n: t for f in data[1].language_model.glob("*.bin") for n, t in torch.load(f, weights_only=True).items()}
    layers = [name for name in base if ".layers." in name]
    assert layers and all(torch.equal(trained[name], base[name].to(trained[name].dtype)) for name in layers)
    start = {n: base[n.replace("side_branch.0", "layers.3")] for n in trained if "side_branch" in n}
    assert any(not torch.equal(trained[n], tensor.to(trained[n].dtype)) for n, tensor in start.items())
    assert len(tiny_train.losses(tmp_path)) == 3


def test_skip_links_train_the_tower_at_its_own_rate(data, stock, tmp_path):
    """Zero-start: the first loss is the stock run's; the tower's group has LLaVA-NeXT's own learning rate."""
    fused = ("SkipLinks.stride = 2", "SkipLinks.train_tower = 'all'")
    rate = {"mm_vision_tower_lr": 2e-6, "save_steps": 3}
    tiny_train.ok(_train(data, tmp_path, *fused, mm_tunable_parts=PARTS, **rate, **ONE_TILE))
    assert tiny_train.losses(tmp_path)[0] == tiny_train.losses(stock)[0]
    state = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert 2e-6 in {group["initial_lr"] for group in state["param_groups"] if group["params"]}
    saved = _tensors(tmp_path)
    assert any("vision_tower" in name for name in saved)
    width = next(t for n, t in saved.items() if n.endswith("mm_projector.0.weight")).shape[1]
    assert width == 32 * (1 + 3) and "llava_patch" in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(("flags", "bindings", "message"), [
    ({"mm_tunable_parts": PARTS}, ["SkipLinks.stride = 2"], "'frozen' freezes the vision tower, which --mm_tunable"),
    ({"mm_tunable_parts": "mm_mlp_adapter"}, ["Routing.split = 3"], "leave Routing out of stage 1"),
    ({"mm_tunable_parts": PARTS, "mm_vision_tower_lr": 1e-6},
     ["SkipLinks.train_tower = 'all'", "SkipLinks.tower_lr = 1e-5"], "both set the vision tower's rate"),
])  # fmt: skip
def test_what_contradicts_its_flags_is_refused_before_anything_is_written(data, tmp_path, flags, bindings, message):
    done = _train(data, tmp_path / "out", *bindings, **flags, **ONE_TILE)
    assert done.returncode != 0 and message in done.stderr, done.stderr[-2000:]
    assert not list((tmp_path / "out").glob("*.safetensors"))
