"""Layers in a row, which run without what each alone needs: the same numbers, and only where nobody looks on."""

import pytest
import torch

from llava_patch import FastV, PyramidDrop, Routing, VisionZip, patch
from llava_patch.hosts import compat
from llava_patch.routing import routed_pass
from tests.support.models import IMAGE

METHODS = {
    **{variant: {"routing": Routing(variant=variant, split=2)} for variant in ("lf", "pc", "kv", "ideal", "vtw")},
    "fastv": {"pruning": FastV(layer=2, ratio=0.5)},
    "lf + fastv": {"routing": Routing(variant="lf", split=3), "pruning": FastV(layer=1, ratio=0.5)},
    "pyramid_drop": {"pruning": PyramidDrop(layers=(1, 2), keep=(0.5, 0.25))},
    "vision_zip": {"pruning": VisionZip(dominant=3, contextual=2)},
}


@pytest.fixture
def rows(monkeypatch):
    """How many layers each row had."""
    found, call_layers = [], compat.call_layers

    def counted(layers, *args, **kwargs):
        found.append(len(layers))
        return call_layers(layers, *args, **kwargs)

    monkeypatch.setattr(routed_pass.compat, "call_layers", counted)
    return found


def _logits(host, batch, side):
    """A prompt, a token that is padding in one sample, and one that is not."""
    mask = batch.valid.long()
    out = host.model(**batch.inputs, use_cache=True)
    found, cache = [out.logits], out.past_key_values
    for valid in ([[0], [1]], [[1], [1]]) if side == "left" else ():
        mask = torch.cat([mask, torch.tensor(valid)], 1)
        out = host.model(input_ids=torch.tensor([[7], [9]]), attention_mask=mask, past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return found


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", METHODS)
def test_layers_in_a_row_give_what_they_give_one_by_one(host, name, side, rows, monkeypatch):
    batch = host.batch([(2, IMAGE, 5), (IMAGE, 3)], side)
    possible = compat.run_in_a_row(list(host.decoder.layers))
    with patch(host.model, **METHODS[name]):
        in_a_row = _logits(host, batch, side)
        assert (max(rows, default=0) > 1) == possible
        rows.clear()
        monkeypatch.setattr(routed_pass.compat, "run_in_a_row", lambda layers: False)
        one_by_one = _logits(host, batch, side)
    assert not rows
    assert len(in_a_row) == len(one_by_one)
    assert all(torch.equal(a, b) for a, b in zip(in_a_row, one_by_one, strict=True))


def test_where_somebody_looks_on_they_run_one_by_one(host, rows):
    batch = host.batch([(2, IMAGE, 5)])
    with patch(host.model, **METHODS["lf"]):
        host.logits(batch, use_cache=False)  # gradients are on
        with torch.no_grad():
            host.model(**batch.inputs, output_hidden_states=True)
            host.decoder.layers[3].gradient_checkpointing = True
            host.decoder.layers[3].train()
            host.logits(batch, use_cache=False)
            host.decoder.layers[3].eval()
            assert not rows
            host.logits(batch, use_cache=False)
    assert bool(rows) == compat.run_in_a_row(list(host.decoder.layers))
