"""Index sets of ragged batches."""

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_patch.routing.plan import Counts, make_plan


def test_positions_keep_their_order_and_come_back():
    image = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]).bool()
    valid = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    plan = make_plan(image, valid)
    assert plan.image.index[0].tolist() == [1, 2]
    assert plan.image.index[1, -1] == 3
    assert plan.image.valid.tolist() == [[True, True], [False, True]]
    assert plan.text.index.tolist() == [[0, 3, 4], [1, 2, 4]]
    assert plan.text.valid is None


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))
def test_merge_undoes_take_for_any_mask(batch, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (batch, tokens), generator=generator)  # 0 text, 1 image, 2 padding
    kind[0, 0], kind[0, 1] = 1, 0
    states = torch.randn(batch, tokens, 3, generator=generator)
    plan = make_plan(kind == 1, kind != 2)
    merged = plan.merge(plan.image.take(states), plan.text.take(states))
    assert torch.equal(merged[kind != 2], states[kind != 2])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 2**31))
def test_the_plan_is_the_same_on_the_host_and_on_the_device(batch, tokens, seed):
    kind = torch.randint(0, 3, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    counts = Counts.of(kind == 1, kind != 2)
    assert counts.image == tuple((kind == 1).sum(1).tolist()) and counts.text == tuple((kind == 0).sum(1).tolist())
    columns = torch.arange(1, tokens + 1)
    assert counts.image_end == int(((kind == 1) * columns).max())
    here, there = make_plan(kind == 1, kind != 2, counts), make_plan(kind == 1, kind != 2, replace(counts, masks=None))
    assert torch.equal(here.restore, there.restore)
    for ours, theirs in ((here.image, there.image), (here.text, there.text)):
        assert torch.equal(ours.index, theirs.index)
        assert torch.equal(ours.validity(), theirs.validity())


def test_rotary_of_one_row_serves_every_sample():
    plan = make_plan(torch.tensor([[1, 0, 0], [0, 0, 1]]).bool(), None)
    rotary = torch.arange(3.0)[None, :, None]
    assert plan.text.take(rotary)[:, :, 0].tolist() == [[1, 2], [0, 1]]
