import torch

from llava_patch.hosts import anatomy
from llava_patch.tools.evidence.small import digits, pages, probing, reader


def test_averaging_keeps_what_is_constant_and_mixes_neighbours_alone():
    assert torch.equal(probing.averaged(torch.ones(2, digits.TOKENS, 3)), torch.ones(2, digits.TOKENS, 3))
    one = torch.zeros(1, digits.TOKENS, 1)
    one[0, 0] = 1
    reached = probing.averaged(one)[0, :, 0].view(digits.GRID, digits.GRID) > 0
    assert reached[:2, :2].all() and reached.sum() == 4


def test_a_larger_share_drops_all_that_a_smaller_one_drops():
    states = torch.ones(200, digits.TOKENS, 2)
    few, many = (probing.dropped(share, 5)(states)[..., 0] == 0 for share in (0.25, 0.5))
    assert (many | ~few).all()
    assert abs(few.float().mean() - 0.25) < 0.03 and abs(many.float().mean() - 0.5) < 0.03


def test_the_taps_of_another_image_leave_the_main_feature():
    states = torch.randn(3, digits.TOKENS, 8)
    moved = probing.taps_of_another_image(states)
    assert torch.equal(moved[..., :2], states[..., :2]) and torch.equal(moved[1, :, 2:], states[0, :, 2:])


def test_damage_reaches_the_projector_and_ends_with_the_block():
    model, drawn = reader.new(0), digits.draw(4, 0, held_out=False)
    before = digits.evaluate(model, drawn).loss
    with probing.damaged(model, probing.averaged):
        assert digits.evaluate(model, drawn).loss != before
    assert digits.evaluate(model, drawn).loss == before and not anatomy.find(model).projector._forward_pre_hooks


def test_a_difference_is_paired_page_by_page():
    less = {"errors": "0.1 0.2 0.3 0.4", "tokens": "4 4 4 4"}
    more = {"errors": "0.2 0.3 0.4 0.5", "tokens": "4 4 4 4"}
    found = probing.rises(more, less)
    assert all(abs(value - 0.1) < 1e-9 for value in (found.value, found.low, found.high))
    assert probing.rises(less, more).value < 0


def test_the_probe_gives_the_same_errors_for_the_same_seed():
    model, samples = reader.new(0), pages.pages("fixed", 20, 0)
    one, again = (probing.probe(model, samples, 3, 1) for _ in range(2))
    assert one == again and len(one["errors"].split()) == 4
    assert one != probing.probe(model, samples, 3, 1, masked=True)
