import pytest
import torch

from llava_patch.hosts import anatomy
from llava_patch.tools.evidence.small import stacked, training
from llava_patch.tools.evidence.small.chain import Chain
from llava_patch.tools.evidence.small.model import weights
from llava_patch.tools.evidence.small.stacked import LAYERS, PAIR, STACKS


@pytest.fixture(scope="module")
def first():
    return weights(stacked.new(3, PAIR))


@pytest.mark.parametrize("name", sorted(STACKS))
def test_every_pair_begins_as_a_copy_and_the_middle_as_something_new(first, name):
    model = stacked.stack(first, STACKS[name], 0)
    layers = anatomy.find(model).layers
    source = [first[f"model.language_model.layers.{i}.mlp.up_proj.weight"] for i in range(PAIR)]
    copies = {pair + i: i for pair in STACKS[name].pairs for i in range(PAIR) if pair + i < LAYERS}
    for number, layer in enumerate(layers):
        same = [torch.equal(layer.mlp.up_proj.weight, weight) for weight in source]
        assert same == [copies.get(number) == i for i in range(PAIR)]


def test_new_layers_are_quiet_and_a_last_one_comes_from_elsewhere(first):
    other = {name: tensor + 1 for name, tensor in first.items()}
    loud, quiet = (anatomy.find(stacked.put(first, {0: 1}, 0, by, last=other)).layers for by in (1.0, 0.1))
    for part in ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.up_proj.weight"):
        name = f"model.language_model.layers.{{}}.{part}"
        assert torch.equal(quiet[0].get_parameter(part), first[name.format(1)])
        assert torch.equal(quiet[LAYERS - 1].get_parameter(part), other[name.format(0)])
        damped = loud[3].get_parameter(part) * (1.0 if "up_proj" in part else 0.1)
        assert torch.equal(quiet[3].get_parameter(part), damped)


def test_projector_and_tower_come_along(first):
    state = stacked.stack(first, STACKS["late"], 0).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in first.items() if "layers" not in name)


def test_the_lens_asks_for_one_step_until_the_last_pair():
    assert STACKS["early"].lens == {1: 1, 3: 2}
    assert STACKS["late"].lens == {1: 1, 6: 1}
    assert STACKS["ladder"].lens == {1: 1, 3: 2, 6: 2}


def test_what_skips_nothing_is_read_as_the_model_reads():
    model = stacked.new(0)
    model.lm_head.weight.data.mul_(50)
    asked = Chain(0).batch(2, 4).questions()
    with torch.no_grad():
        out = training.run_questions(model, asked)
        skipping = [stacked.unread_loss(model, asked, out, source, 7).item() for source in (2, 7)]
        logits = out.logits[:, asked.prefix.shape[1] :].unflatten(1, asked.questions.shape[1:])[:, :, -1]
    deepest = asked.questions[..., 1] == asked.questions[..., 1].max()
    letters = logits[deepest][:, 4 : 4 + 16].log_softmax(-1)
    assert skipping[1] == pytest.approx((-letters.mean() - torch.tensor(16.0).log()).item(), rel=1e-4)
    assert skipping[0] != pytest.approx(skipping[1], rel=1e-3)


def test_the_uniform_distribution_is_the_least_of_that_loss():
    model = stacked.new(0)
    model.lm_head.weight.data.zero_()
    asked = Chain(0).batch(2, 4).questions()
    with torch.no_grad():
        out = training.run_questions(model, asked)
        assert stacked.unread_loss(model, asked, out, 3, 7).item() == pytest.approx(0, abs=1e-5)
