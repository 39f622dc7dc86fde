"""PruMerge: what the tower's states say, each picture's own number of tokens, and the decoder without what left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_patch import PruMerge, Routing, SkipLinks, patch
from llava_patch.core.errors import HostError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.flops.count import Mode, decoder_positions
from llava_patch.routing import reference
from llava_patch.routing.reference_tower import pru_merge
from llava_patch.routing.schedule import make_schedule
from llava_patch.routing.tower_pruning import TowerView
from tests.support import models
from tests.support.models import IMAGE, close
from tests.support.routings import RAGGED, VARIANTS, alone, embeddings, extend

MERGES = [PruMerge(plus=False, neighbours=3), PruMerge(neighbours=5)]


@pytest.fixture
def host(host: Any) -> Any:
    """A tower whose CLS token looks at a few patches of the samples' images more than at the rest."""
    block = find(host.model).vision_parts().blocks[find(host.model).main_block]
    with torch.no_grad():
        block.self_attn.q_proj.weight.mul_(3)
    return host


@torch.no_grad()
@pytest.mark.parametrize("settings", MERGES, ids=str)
def test_the_decoder_gets_what_the_definition_makes_of_the_towers_states(host: Any, settings: PruMerge) -> None:
    batch, anatomy, seen = host.batch(RAGGED, "left"), find(host.model), {}
    attention = anatomy.vision_parts().blocks[anatomy.main_block].self_attn
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda module, args, output, name=name: seen.__setitem__(name, output)
        )
        for name in ("q", "k")
    ]
    pixels = batch.inputs["pixel_values" if host.name == "hf" else "images"]
    states = anatomy.vision_model(pixels, output_hidden_states=True).hidden_states[anatomy.main_block]
    for hook in hooks:
        hook.remove()
    made = [
        pru_merge(*rows, settings.plus, settings.neighbours, 1)
        for rows in zip(states, seen["q"], seen["k"], strict=True)
    ]
    images = [0, 1, 2, 3] if host.name == "hf" else [0, 1, 2, 4]  # llava has a dummy image for the text alone
    features = anatomy.projector(torch.stack([made[i][0] for i in images]))
    stays = torch.stack([made[i][1] for i in images])
    assert len(set(stays.sum(1).tolist())) > 1, "pictures must differ in this test"
    with patch(host.model, pruning=settings):
        given = embeddings(host, batch)
        kept = host.model(**batch.inputs, use_cache=True).past_key_values.kept()
    assert torch.equal(kept[batch.image], stays.flatten())
    assert close(given[kept & batch.image], features[stays])


@torch.no_grad()
@pytest.mark.parametrize("case", ["none", "lf", "kv", "vtw"])
def test_decode_and_forward_are_the_definition_of_what_is_left(host: Any, case: str) -> None:
    batch, settings = host.batch(RAGGED, "left"), VARIANTS.get(case, {})
    with patch(host.model, pruning=MERGES[1], **settings):
        embeds, logits = embeddings(host, batch), host.logits(batch)
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        kept = cache.kept()
        one = torch.randint(3, 90, (4, 1))
        mask = torch.cat([batch.valid.long(), torch.ones(4, 1, dtype=torch.long)], 1)
        got = host.model(input_ids=one, attention_mask=mask, past_key_values=cache).logits[:, -1]
        assert close(got, host.model(**extend(batch, one), use_cache=False).logits[:, -1])
        for i, valid in enumerate(batch.valid):
            row, image, choice = embeds[i][valid], batch.image[i][valid], kept[i][valid]
            states = reference.final_states(host.decoder, row, image, settings.get("routing"), there=choice)
            assert close(logits[i][valid], host.model.lm_head(states))
            assert close(logits[i][valid], host.logits(alone(host, RAGGED, i))[0])


@torch.no_grad()
def test_a_fusion_on_channels_is_reduced_with_the_main_feature(host: Any) -> None:
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, pruning=MERGES[0]):
        expected = host.logits(batch)
    with patch(host.model, pruning=MERGES[0], fusion=SkipLinks(stride=2), routing=Routing(split=6)):
        assert close(host.logits(batch), expected)  # the taps' columns are zero


def test_what_it_cannot_have_is_refused(host: Any) -> None:
    with pytest.raises(SettingError, match="takes images of 33 patches or more: this model's have 16"):
        patch(host.model, pruning=PruMerge())
    with pytest.raises(SettingError, match="how many tokens stay depends on the picture"):
        decoder_positions(make_schedule(None, MERGES[0], 6), 5, 16, Mode.FORWARD)
    name = "mm_vision_select_layer" if host.name == "llava" else "vision_feature_layer"
    setattr(host.model.config, name, -1)
    if host.name == "llava":
        host.model.get_vision_tower().select_layer = -1
    with pytest.raises(SettingError, match="goes by the block behind the main feature"):
        patch(host.model, pruning=MERGES[0])


def test_a_tower_without_cls_is_refused() -> None:
    models.needs_hf()
    from transformers import LlamaConfig

    host = models.anyres_host("onevision", LlamaConfig(**models.TEXT))
    with pytest.raises(HostError, match="CLS token's attention, but this model's vision tower has none"):
        patch(host.model, pruning=MERGES[0])


@torch.no_grad()
def test_where_every_patch_stays_none_is_overwritten() -> None:
    patches, outliers, width = 24, 5, 8
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.zeros(width), torch.randn(1 + patches, width, generator=generator) * 0.1
    query[0], keys[-outliers:, 0] = 4.0, 4.0  # the last patches stand out, and the grid is every one
    states = torch.randn(1 + patches, width, generator=generator)
    view = TowerView(
        states[None, 1:], None, query[None, None, None], keys[None, None], width**-0.5, has_cls=True, first=1
    )
    found, stays = PruMerge(neighbours=3).reduce(view)
    expected, kept = pru_merge(states, query[None], keys, True, 3, 1)
    assert stays.all() and kept.all()
    assert close(found[0], expected)
