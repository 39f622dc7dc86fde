"""LLaVA's multi-scale (S2) towers, which its repository has: routing works on them, what reads patches refuses them."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import llava_patch
from llava_patch import AttentionMaps, AuxiliaryProbe, FastV, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.flops.shape import read_shape, shape_of
from llava_patch.probe.view import make_transform
from tests.support import models
from tests.support.models import IMAGE, LAYERS, close, silence_side_branch

RAGGED = [(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4), (7,)]


def several_scales(encode, images, img_sizes, max_split_size):
    """What the package `s2wrapper` is asked for: features of each scale, cut into tiles, side by side in channels."""
    found = []
    for side in img_sizes:
        n = side // max_split_size
        scaled = functional.interpolate(images, (side, side), mode="bicubic")
        tiles = scaled.unfold(2, max_split_size, max_split_size).unfold(3, max_split_size, max_split_size)
        features = encode(tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2))  # [images * n * n, tokens, channels]
        patches = int(features.shape[1] ** 0.5)
        plane = (
            features.view(len(images), n, n, patches, patches, -1).permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
        )
        found.append(functional.adaptive_avg_pool2d(plane, patches).flatten(2).transpose(1, 2))
    return torch.cat(found, dim=-1)


@pytest.fixture
def s2(tower_folder, monkeypatch):
    """A tiny model of two scales; where the installed `llava` has none, one that only says so."""
    from llava.model.multimodal_encoder import clip_encoder

    monkeypatch.setitem(sys.modules, "s2wrapper", SimpleNamespace(forward=several_scales))
    if hasattr(clip_encoder, "CLIPVisionTowerS2"):
        changes = {"s2": True, "s2_scales": "56,112", "mm_hidden_size": 64}
        return models.Host("llava", models.llava_model(tower_folder, **changes))
    model = models.llava_model(tower_folder)
    model.get_vision_tower().s2_scales = [56, 112]
    return models.Host("llava", model)


@torch.no_grad()
def test_the_decoder_is_routed_as_ever(s2):
    batch = s2.batch(RAGGED)
    stock = s2.logits(batch)
    with patch(s2.model, routing=Routing(split=LAYERS - 2, fusion_layers=2)):
        assert not close(s2.logits(batch)[batch.valid], stock[batch.valid])
        silence_side_branch(s2.decoder)
        assert close(s2.logits(batch)[batch.valid], stock[batch.valid])
    with patch(s2.model, pruning=FastV(layer=2, ratio=0.5, training=False)):
        assert not close(s2.logits(batch)[batch.valid], stock[batch.valid])
    assert torch.equal(s2.logits(batch), stock)


def test_what_reads_patches_refuses_it_by_name(s2):
    image = s2.batch([(2, IMAGE, 5)]).inputs
    for work, name in [
        (lambda: patch(s2.model, fusion=SkipLinks(stride=2)), "SkipLinks"),
        (lambda: patch(s2.model, probe=AuxiliaryProbe()), "AuxiliaryProbe"),
        (lambda: make_transform(find(s2.model), s2.model.get_vision_tower().image_processor, "resize"), "R-Probe"),
        (lambda: shape_of(s2.model), "flops"),
        (lambda: llava_patch.measure_attention_maps(s2.model, [image], AttentionMaps()), "attention_maps"),
    ]:
        with pytest.raises(HostError, match=rf"{name} does not know multi-scale \(S2\) towers"):
            work()
    assert llava_patch.get_handle(s2.model) is None


def test_a_checkpoint_that_names_it_is_refused_where_its_files_are_read(s2, tmp_path, monkeypatch):
    values = {**s2.model.config.to_dict(), "s2": True, "architectures": ["LlavaLlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(HostError, match=r"does not know multi-scale \(S2\) towers"):
        read_shape(str(tmp_path))
    if "s2_scales" in values:  # it is built by a package that may be missing
        assert configs.skeleton(configs.read(str(tmp_path)).config, "llava").get_vision_tower().hidden_size == 64
        monkeypatch.setitem(sys.modules, "s2wrapper", None)
        with pytest.raises(HostError, match="s2wrapper not found"):
            configs.skeleton(configs.read(str(tmp_path)).config, "llava")
