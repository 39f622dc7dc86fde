"""What the demo finds out about a stock and a patched model."""

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from llava_patch import FastV, Routing, SkipLinks, get_handle, patch
from llava_patch.core.errors import CheckpointError, HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.settings import active
from llava_patch.tools.demo import compute
from llava_patch.tools.demo.compute import open_models

from .conftest import LAYERS, SIDE

BOTH = {"routing": Routing(split=3), "pruning": FastV(2, 0.5)}
ASKED = "Which word is it?"


@pytest.mark.parametrize("host", ["hf", "llava"])
def test_where_image_tokens_go_and_what_the_answer_looks_at(files, picture, host):
    if host == "llava":
        pytest.importorskip("llava")
    models = open_models(str(getattr(files, host)), device="cpu", dtype="float32")
    model = models.stock.model
    stock, routed = models.answers(picture, ASKED, 5, BOTH)
    assert get_handle(model) is None and models.depth == LAYERS
    assert stock.methods == {} and routed.methods == BOTH
    assert stock.runs.shape == (LAYERS, SIDE, SIDE) and stock.runs.all()
    assert routed.runs[:2].all() and routed.runs[2].sum() == SIDE * SIDE / 2
    assert not routed.runs[3:5].any() and torch.equal(routed.runs[5], routed.runs[2])
    for one in (stock, routed):
        assert torch.equal(one.attention.isnan(), ~one.runs)
        assert one.pixels.shape == (56, 56, 3) and one.image_tokens == SIDE * SIDE < one.prompt_tokens
        assert one.prefill_ms > 0 and 1 <= one.tokens <= 5
        assert (one.decode_ms is None) == (one.tokens == 1) and (one.decode_ms is None or one.decode_ms > 0)
    # The same from the model's own attention and its own answer.
    inputs = models.stock.inputs().forward_inputs(picture, ASKED)
    rest = dict(inputs)
    with torch.no_grad():
        said = model.generate(rest.pop("input_ids"), **rest, do_sample=False, max_new_tokens=5)
        model.set_attn_implementation("eager")
        whole = model(**inputs, output_attentions=True).attentions
    assert models.stock.tokenizer.decode(said[0, -stock.tokens :], skip_special_tokens=True).strip() == stock.text
    first = whole[0].shape[-1] - stock.prompt_tokens
    assert first == 0
    image = stock.prompt_tokens - _behind(inputs) - SIDE * SIDE
    for layer, weights in enumerate(whole):
        there = weights[0].mean(0)[-1][image : image + SIDE * SIDE].view(SIDE, SIDE)
        assert torch.allclose(stock.attention[layer], there, atol=1e-5)


def _behind(inputs):
    """Text tokens behind the image."""
    ids = inputs["input_ids"][0]
    places = ((ids == -200) | (ids == 512)).nonzero().flatten()
    return len(ids) - 1 - int(places[-1])


def test_a_patched_checkpoint_stands_beside_its_base(files, picture, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(files.hf)
    handle = patch(model, fusion=SkipLinks(stride=1, merge_size=2), routing=Routing(variant="vtw", split=2))
    handle.save(tmp_path / "adapter", base=str(files.hf))
    models = open_models(str(tmp_path / "adapter"), device="cpu", dtype="float32")
    stock, merged = models.answers(picture, ASKED, 2)
    assert stock.runs.shape == (LAYERS, 4, 4) and stock.methods == {}
    assert (
        merged.runs.shape == (LAYERS, 2, 2)
        and merged.image_tokens == 4
        and set(merged.methods) == {"fusion", "routing"}
    )
    assert merged.runs[:2].all() and not merged.runs[2:].any() and merged.attention[2:].isnan().all()


def test_gin_says_what_is_put_on_a_stock_checkpoint(files, picture):
    with active.also([], ["FastV.layer = 1", "FastV.ratio = 0.75"]):
        models = open_models(str(files.hf), device="cpu")
        assert models.methods == {"pruning": FastV(1, 0.75)} and get_handle(models.stock.model) is None
        _, pruned = models.answers(picture, ASKED, 1)
    assert pruned.runs[1:].sum((1, 2)).tolist() == [4] * (LAYERS - 1)
    with active.also([], ['Routing.split = "auto"']), pytest.raises(SettingError, match="name a layer"):
        open_models(str(files.hf))


def test_what_cannot_be_shown_is_said(files, picture, tmp_path):
    models = open_models(str(files.hf), device="cpu")
    with pytest.raises(InputError, match="ask a question"):
        models.answers(picture, "  ", 1, BOTH)
    with pytest.raises(SettingError, match="nothing to compare with"):
        models.answers(picture, ASKED, 1)
    with pytest.raises(SettingError, match="split"):
        models.answers(picture, ASKED, 1, {"routing": Routing(split=7)})
    assert get_handle(models.stock.model) is None
    with pytest.raises(HostError, match="15 image tokens cannot be drawn over 4 x 4 patches"):
        compute.cells_of(find(models.stock.model), 15)
    with patch(models.stock.model, routing=Routing(split=3)) as handle:
        handle.save(tmp_path / "full", "full")
    with pytest.raises(CheckpointError, match="say with --base what to compare it with"):
        open_models(str(tmp_path / "full"))
