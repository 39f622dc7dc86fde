"""Prunings of several stages: their settings, and a choice that is repeated."""

import pytest
import torch

from llava_patch import PyramidDrop, Routing, patch
from llava_patch.core.errors import InputError, SettingError
from llava_patch.settings.methods import from_dict, to_dict
from tests.support.models import IMAGE


def test_each_stage_counts_what_the_sample_began_with():
    settings = PyramidDrop()
    assert [settings.keep_counts(i, (576, 10, 3), (0, 4, 0)) for i in range(3)] == [
        (288, 5, 1),
        (144, 4, 0),
        (72, 4, 0),
    ]
    assert PyramidDrop((2, 4), (300, 100)).keep_counts(1, (576, 40), (0, 0)) == (100, 40)
    assert from_dict(to_dict(settings), "here") == settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (2, 4)}, r"keep = .*layers = \(2, 4\): give a value for each stage"),
        ({"layers": (4, 2, 8)}, "layers in order, none twice"),
        ({"layers": (0, 2, 8)}, "an integer >= 1"),
        ({"layers": 8}, "a tuple with a value for each stage"),
        ({"keep": (0.5, 0.6, 0.1)}, "none above the one before"),
        ({"keep": (9, 0.6, 0.1)}, "all shares or all numbers"),
        ({"keep": (1.5, 0.6, 0.1)}, "shares from 0.0 to 1.0"),
        ({"count": "floor"}, "one of int, round, ceil"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(SettingError, match=f"PyramidDrop.*{message}"):
        PyramidDrop(**settings)


@pytest.mark.parametrize("routing", [None, Routing(split=3)], ids=["alone", "lf"])
def test_a_stage_that_the_model_has_no_layer_for_is_refused(host, routing):
    with pytest.raises(SettingError, match=r"PyramidDrop.layers = \(1, 2, 9\): 9 is outside 1\.\.[35]"):
        patch(host.model, routing=routing, pruning=PyramidDrop((1, 2, 9)))


@torch.no_grad()
def test_a_choice_is_repeated_stage_by_stage(host):
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 1, IMAGE, 4)], "left")
    stock = host.logits(batch)
    with patch(host.model, pruning=PyramidDrop((1, 3, 4), (1.0, 1.0, 1.0))):
        assert torch.equal(host.logits(batch), stock)
    with patch(host.model, pruning=PyramidDrop((1, 3, 4), (0.75, 0.5, 0.125))) as handle:
        chosen = host.logits(batch, use_cache=False)
        passed = host.model(**batch.inputs, use_cache=True).past_key_values.kept()
        counts = [
            [int((row[image] == i).sum()) for i in range(4)] for row, image in zip(passed, batch.image, strict=True)
        ]
        assert counts == [[4, 4, 6, 2], [8, 8, 12, 4]] and (passed[batch.valid & ~batch.image] == 3).all()
        with handle.image_positions(kept=passed):
            assert torch.equal(host.logits(batch, use_cache=False)[batch.valid], chosen[batch.valid])
        other = passed.where(~batch.image, 4 - passed)  # what left early stays, and the other way round
        with handle.image_positions(kept=other):
            assert not torch.equal(host.logits(batch, use_cache=False)[batch.valid], chosen[batch.valid])
        with pytest.raises(InputError, match="prunes in 3 stages: give int64"):
            with handle.image_positions(kept=passed > 0):
                host.logits(batch)
