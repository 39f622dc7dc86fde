"""FastV's own setting: what becomes of a share of tokens that is no whole number."""

import pytest
import torch

from llava_patch import FastV, patch
from llava_patch.core.errors import SettingError
from llava_patch.routing.reference import final_states
from llava_patch.settings.methods import from_dict, to_dict
from tests.support.models import IMAGE, close
from tests.support.routings import embeddings

LEFT = {"ceil": (3, 289, 1), "round": (2, 288, 0), "int": (2, 288, 0)}  # half of 5, of 577 and of 1


@pytest.mark.parametrize("count", LEFT)
def test_a_share_is_counted_as_asked(count):
    assert FastV(ratio=0.5, count=count).keep_counts(0, (5, 577, 1), (0, 0, 0)) == LEFT[count]
    assert FastV(ratio=0.5, count=count).keep_counts(0, (1, 5), (1, 4)) == (1, 4)  # what is read stays


def test_another_count_is_refused():
    with pytest.raises(SettingError, match=r"FastV.count = 'floor': expected one of ceil, round, int"):
        FastV(count="floor")


def test_settings_saved_before_there_was_a_count_are_the_default():
    assert from_dict({"method": "FastV", "layer": 3, "ratio": 0.3, "training": False}, "here") == FastV(3, 0.3)
    assert from_dict(to_dict(FastV(count="int")), "here") == FastV(count="int")


@torch.no_grad()
@pytest.mark.parametrize("count", LEFT)
def test_each_count_is_what_its_definition_says(host, count):
    batch, settings = host.batch([(2, IMAGE, 5)]), FastV(layer=2, ratio=0.7, count=count)
    embeds = embeddings(host, batch)
    states = final_states(host.decoder, embeds[0], batch.image[0], pruning=settings)
    with patch(host.model, pruning=settings) as handle:
        logits = host.logits(batch, use_cache=False)[0]
        assert close(logits, host.model.lm_head(states))
        cache = host.model(**batch.inputs, use_cache=True).past_key_values
        assert int(cache.kept().sum() - (~batch.image).sum()) == {"ceil": 5, "round": 5, "int": 4}[count]
        assert handle.record()["pruning"]["count"] == count
