"""VisionZip: what the tower's states say, where it goes, and the decoder without what left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava_patch import DeepStack, DenseConnector, Routing, SkipLinks, VisionZip, patch
from llava_patch.core.errors import InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.flops.count import Mode, decoder_positions
from llava_patch.routing import reference, tower_hooks
from llava_patch.routing.reference_tower import vision_zip
from llava_patch.routing.schedule import make_schedule
from tests.support import models
from tests.support.models import IMAGE, TOKENS, close
from tests.support.routings import RAGGED, VARIANTS, alone, embeddings, extend

ZIP = VisionZip(dominant=5, contextual=3)


@torch.no_grad()
def plainly(host: Any, settings: VisionZip, pixels: Tensor, prefix: int, dropped: int) -> tuple[Tensor, Tensor]:
    """The definition on the stock tower's eager attention: projected tokens [images, tokens, hidden], and who stays."""
    anatomy, keys = find(host.model), []
    vision, main = anatomy.vision_model, anatomy.main_block
    before = vision.config._attn_implementation
    vision.set_attn_implementation("eager")
    hook = (
        anatomy.vision_parts()
        .blocks[main - 1]
        .self_attn.k_proj.register_forward_hook(lambda module, args, output: keys.append(output))
    )
    output = vision(pixels, output_hidden_states=True, output_attentions=True)
    hook.remove()
    vision.set_attn_implementation(before)
    attention, heads = output.attentions[main - 1], output.attentions[main - 1].shape[1]
    made = [
        vision_zip(states, probabilities, key.unflatten(-1, (heads, -1)).transpose(0, 1), settings.dominant,
                   settings.contextual, prefix, dropped)
        for states, probabilities, key in zip(output.hidden_states[main], attention, keys[0], strict=True)
    ]  # fmt: skip
    return anatomy.projector(torch.stack([m[0] for m in made])), torch.stack([m[1] for m in made])


def pixels_of(host: Any, batch: Any) -> Tensor:
    return batch.inputs["pixel_values" if host.name == "hf" else "images"]


@torch.no_grad()
@pytest.mark.parametrize("settings", [ZIP, VisionZip(9, 0), VisionZip(1, 6), VisionZip(3, 12)], ids=str)
def test_the_decoder_gets_what_the_definition_makes_of_the_towers_states(host: Any, settings: VisionZip) -> None:
    batch = host.batch(RAGGED, "left")
    pixels = pixels_of(host, batch)
    stock = embeddings(host, batch)
    features, stays = plainly(host, settings, pixels, 1, 1)
    images = [0, 1, 2, 3] if host.name == "hf" else [0, 1, 2, 4]  # llava has a dummy image for the text alone
    with patch(host.model, pruning=settings):
        given = embeddings(host, batch)
        kept = host.model(**batch.inputs, use_cache=True).past_key_values.kept()
    assert torch.equal(kept[batch.image], stays[images].flatten()) and kept[~batch.image & batch.valid].all()
    assert torch.equal(given[~batch.image], stock[~batch.image])
    assert close(given[kept & batch.image], features[images][stays[images]])
    assert stays.sum(1).tolist() == [settings.dominant + settings.contextual] * len(pixels)


@torch.no_grad()
@pytest.mark.parametrize("case", ["none", *VARIANTS])
def test_with_every_variant_it_is_the_definition(host: Any, case: str) -> None:
    batch, settings = host.batch(RAGGED, "left"), VARIANTS.get(case, {})
    with patch(host.model, pruning=ZIP, **settings):
        embeds, logits = embeddings(host, batch), host.logits(batch)
        kept = host.model(**batch.inputs, use_cache=True).past_key_values.kept()
        for i, valid in enumerate(batch.valid):
            row, image, choice = embeds[i][valid], batch.image[i][valid], kept[i][valid]
            states = reference.final_states(host.decoder, row, image, settings.get("routing"), there=choice)
            assert close(logits[i][valid], host.model.lm_head(states))


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_batch_gives_each_sample_what_it_gets_alone(host: Any, padding: str) -> None:
    batch = host.batch(RAGGED, padding)
    with patch(host.model, pruning=ZIP, routing=Routing(split=2)):
        logits = host.logits(batch)
        for i, valid in enumerate(batch.valid):
            assert close(logits[i][valid], host.logits(alone(host, RAGGED, i))[0])


@torch.no_grad()
@pytest.mark.parametrize("case", ["none", "lf", "kv", "pc", "vtw", "lf-split0"])
def test_cached_decode_is_recomputation(host: Any, case: str) -> None:
    batch, tokens = host.batch(RAGGED, "left", seed=4), torch.randint(3, 90, (4, 4))
    with patch(host.model, pruning=ZIP, **VARIANTS.get(case, {})):
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        mask = batch.valid.long()
        for step in range(4):
            mask = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], 1)
            one = {"input_ids": tokens[:, step : step + 1], "attention_mask": mask}
            got = host.model(**one, past_key_values=cache, use_cache=True).logits[:, -1]
            whole = host.model(**extend(batch, tokens[:, : step + 1]), use_cache=False).logits[:, -1]
            assert close(got, whole)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generation_goes_on_from_what_stays(host: Any, options: dict[str, Any]) -> None:
    batch = host.batch([(2, IMAGE, 5), (2, IMAGE, 5)], seed=3)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, **options}
    options["suppress_tokens"] = [models.HF_IMAGE_TOKEN]
    inputs = dict(batch.inputs)
    ids = inputs.pop("input_ids")
    with patch(host.model, pruning=ZIP):
        answer = host.model.generate(ids, **inputs, **options)[:, -3:]
        if "num_beams" in options:
            assert torch.equal(answer, host.model.generate(ids, **inputs, **options)[:, -3:])
            return
        tokens = torch.empty(2, 0, dtype=torch.long)
        for _ in range(3):
            logits = host.model(**extend(batch, tokens), use_cache=False).logits[:, -1]
            logits[:, [2, models.HF_IMAGE_TOKEN]] = -torch.inf
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(answer, tokens)


@torch.no_grad()
def test_a_fusion_on_channels_is_reduced_with_the_main_feature(host: Any) -> None:
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, pruning=ZIP):
        alone_, kept = embeddings(host, batch), host.model(**batch.inputs, use_cache=True).past_key_values.kept()
    with patch(host.model, pruning=ZIP, fusion=SkipLinks(stride=2)) as handle:
        assert close(embeddings(host, batch), alone_)  # the taps' columns are zero
        torch.nn.init.normal_(handle.anatomy.first_linear()[2].weight)
        assert not close(embeddings(host, batch), alone_)
        again = host.model(**batch.inputs, use_cache=True).past_key_values.kept()
    assert torch.equal(kept, again)


@torch.no_grad()
def test_the_towers_backend_is_asked_for_no_attention(host: Any, monkeypatch: Any) -> None:
    batch, vision = host.batch([(2, IMAGE, 5)]), find(host.model).vision_model
    seen = []
    vision.register_forward_hook(lambda m, a, o: seen.append(o.attentions if hasattr(o, "attentions") else None))
    with patch(host.model, pruning=ZIP):
        host.logits(batch)
    assert vision.config._attn_implementation == "sdpa" and seen == [None]


def test_in_training_nothing_leaves_unless_asked_and_then_the_projector_learns(host: Any) -> None:
    batch = host.batch([(2, IMAGE, 5)], labels=True)
    stock = host.logits(batch)
    host.model.train()
    with patch(host.model, pruning=ZIP):
        assert torch.equal(host.logits(batch), stock)
    with patch(host.model, pruning=VisionZip(5, 3, training=True)) as handle:
        assert not close(host.logits(batch), stock)
        host.model(**batch.inputs).loss.backward()
        assert all(p.grad is not None for p in handle.anatomy.projector.parameters())
    host.model.eval()
    assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
def test_images_encoded_outside_of_a_call_are_the_stock_models(host: Any) -> None:
    anatomy, pixels = find(host.model), torch.randn(1, 3, 56, 56)
    stock = anatomy.encode_images(pixels)
    with patch(host.model, pruning=ZIP):
        assert torch.equal(anatomy.encode_images(pixels), stock)


@torch.no_grad()
def test_embeddings_without_pixels_need_the_choice(host: Any) -> None:
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, pruning=ZIP) as handle:
        expected, embeds = host.logits(batch), embeddings(host, batch).clone()
        kept = host.model(**batch.inputs, use_cache=True).past_key_values.kept()
        with pytest.raises(InputError, match="VisionZip chooses by what the vision tower saw"), \
                handle.image_positions(batch.image):  # fmt: skip
            host.model(inputs_embeds=embeds)
        with handle.image_positions(batch.image, kept=kept):
            assert torch.equal(host.model(inputs_embeds=embeds).logits, expected)


@pytest.mark.parametrize(
    "fusion", [SkipLinks(stride=2, merge_size=2), DenseConnector(kind="sti"), DeepStack(start=0)], ids=str
)
def test_fusions_with_other_tokens_are_refused(host: Any, fusion: Any) -> None:
    with pytest.raises(SettingError, match="VisionZip chooses among the vision tower's patches, but"):
        patch(host.model, fusion=fusion, pruning=ZIP)
    with patch(host.model, pruning=ZIP), pytest.raises(SettingError, match="give both to one call of patch"):
        patch(host.model, fusion=SkipLinks(stride=2))


def test_settings_that_leave_everything_in_are_refused(host: Any) -> None:
    with pytest.raises(SettingError, match=f"takes images of {TOKENS + 1} patches or more: this model's have {TOKENS}"):
        patch(host.model, pruning=VisionZip(TOKENS - 3, 3))
    with pytest.raises(SettingError, match=r"VisionZip\.dominant"):
        VisionZip(dominant=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["next", "onevision"])
def test_each_tile_has_its_own_choice(kind: str) -> None:
    models.needs_hf()
    from transformers import LlamaConfig

    host = models.anyres_host(kind, LlamaConfig(**models.TEXT))
    tiles = 3 if kind == "next" else 2
    batch = host.batch([(2, IMAGE, 5) if kind == "next" else (2, IMAGE, 1, IMAGE, 5)], "left")
    with patch(host.model, pruning=ZIP):
        expected = host.logits(batch)
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        kept = int((cache.kept() & batch.image).sum())
        one = torch.tensor([[7]])
        step = host.model(input_ids=one, attention_mask=torch.ones(1, batch.valid.shape[1] + 1, dtype=torch.long),
                          past_key_values=cache).logits[:, -1]  # fmt: skip
        assert close(step, host.model(**extend(batch, one), use_cache=False).logits[:, -1])
    assert 0 < kept <= tiles * ZIP.tokens < int(batch.image.sum()) and torch.isfinite(expected).all()


@torch.no_grad()
def test_videos_and_tiles_that_the_host_blends_are_refused() -> None:
    models.needs_hf()
    from transformers import LlamaConfig

    host = models.anyres_host("onevision", LlamaConfig(**models.TEXT))
    with patch(host.model, pruning=ZIP):
        with pytest.raises(InputError, match="VisionZip knows still images"):
            host.logits(host.batch([(2, models.VIDEO, 5)]))
        with pytest.raises(InputError, match="makes tokens of several patches here"):
            host.logits(host.batch([(2, IMAGE, 5)]))  # anyres_max


@torch.no_grad()
def test_a_tower_without_cls_goes_by_what_all_tokens_look_at() -> None:
    models.needs_hf()
    from transformers import LlamaConfig

    host = models.anyres_host("onevision", LlamaConfig(**models.TEXT))
    anatomy, pixels = find(host.model), torch.randn(3, 3, 56, 56)
    features, stays = plainly(host, ZIP, pixels, 0, anatomy.dropped_tokens)
    states = anatomy.vision_model(pixels, output_hidden_states=True).hidden_states
    main = anatomy.main_block
    got, choice = tower_hooks._reduced(anatomy, anatomy.vision_parts(), ZIP, states[main - 1], states[main])
    assert torch.equal(choice, stays) and stays.sum(1).tolist() == [8] * 3
    assert close(anatomy.projector(got[:, anatomy.dropped_tokens :]), features)


def test_every_layer_of_the_flop_model_has_what_stays_of_each_tile() -> None:
    program = make_schedule(Routing(split=3), ZIP, 6)
    at = decoder_positions(program, 5, 2 * TOKENS, Mode.FORWARD, tiles=2)
    assert [layer.held for layer in at.layers] == [5 + 16] * 3 + [5] * 2 + [5 + 16] and at.images == 16
    assert not at.choosers
