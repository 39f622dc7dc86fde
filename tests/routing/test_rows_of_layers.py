"""Layers in a row, which run without what each alone needs: the same numbers, and only where nobody looks on."""

import pytest
import torch

from llava_patch import FastV, Routing, patch
from llava_patch.hosts import compat
from llava_patch.routing import routed_pass
from llava_patch.settings.methods import PyramidDrop
from tests.support.models import IMAGE

METHODS = {
    **{variant: {"routing": Routing(variant=variant, split=2)} for variant in ("lf", "pc", "kv", "ideal", "vtw")},
    "fastv": {"pruning": FastV(layer=2, ratio=0.5)},
    "lf + fastv": {"routing": Routing(variant="lf", split=3), "pruning": FastV(layer=1, ratio=0.5)},
    "pyramid_drop": {"pruning": PyramidDrop(layers=(1, 3), keep=(0.5, 0.25))},
}


@pytest.mark.parametrize("name", METHODS)
def test_layers_in_a_row_give_what_they_give_one_by_one(host, name, monkeypatch):
    batch, rows = host.batch([(2, IMAGE, 5), (IMAGE, 3)]), []

    def counted(layers, *args, **kwargs):
        rows.append(len(layers))
        return compat_call_layers(layers, *args, **kwargs)

    compat_call_layers = compat.call_layers
    monkeypatch.setattr(routed_pass.compat, "call_layers", counted)
    with patch(host.model, **METHODS[name]):
        one_by_one = host.logits(batch, use_cache=False)  # gradients are on
        assert not rows
        with torch.no_grad():
            in_a_row = host.logits(batch, use_cache=False)
    assert torch.equal(in_a_row, one_by_one)
    assert bool(rows) == compat.run_in_a_row(list(host.decoder.layers))
