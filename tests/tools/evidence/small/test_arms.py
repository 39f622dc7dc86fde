import pytest
import torch

from llava_patch import FastV, Routing, patch
from llava_patch.tools.evidence.small import arms, stacked
from llava_patch.tools.evidence.small.arms import Base
from llava_patch.tools.evidence.small.chain import Chain
from llava_patch.tools.evidence.small.model import weights
from llava_patch.tools.evidence.small.training import Recipe

SHORT = Recipe(2, 1e-2, warmup=1, decay=0.0)


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setattr(arms, "TEST", 8)
    return Base(weights(stacked.new(0)), (1, 2), 0, torch.device("cpu"))


def test_an_arm_that_routes_nothing_answers_as_the_stock_model(base):
    assert base.answers(Routing(variant="vtw", split=8)) == base.answers()
    assert base.answers().startswith("8:")


def test_a_side_branch_trains_alone_and_from_the_same_start(base):
    own, again = (base.side(Routing(split=4), recipe=SHORT, batch=4) for _ in range(2))
    assert own == again
    assert 0 < own["trainable"] < 0.2


def test_another_picture_reaches_the_side_branch():
    model = stacked.new(0)
    given = Chain(0).batch(2).inputs()
    with patch(model, routing=Routing(split=4)) as handle, torch.no_grad():
        own = model(**given).logits[:, -1]
        with arms.other_image(handle.anatomy.decoder.side_branch):
            other = model(**given).logits[:, -1]
        assert not torch.allclose(own, other)
        assert torch.equal(own, model(**given).logits[:, -1])


def test_a_scattered_branch_differs_from_the_layer_that_it_was_copied_from():
    model = stacked.new(0)
    with patch(model, routing=Routing(split=4)) as handle:
        branch, layer = handle.anatomy.decoder.side_branch[0], handle.anatomy.layers[4]
        assert torch.equal(branch.mlp.up_proj.weight, layer.mlp.up_proj.weight)
        arms.scatter(handle.anatomy.decoder.side_branch, 0)
        assert not torch.equal(branch.mlp.up_proj.weight, layer.mlp.up_proj.weight)
        assert torch.equal(branch.input_layernorm.weight, layer.input_layernorm.weight)


def test_full_tuning_leaves_the_tower_out_and_lora_trains_less(base):
    full = base.tuned(None, SHORT)
    pytest.importorskip("peft")
    lora = base.tuned(4, SHORT)
    assert lora["trainable"] < full["trainable"] < 1


def test_the_cost_is_below_one_where_image_tokens_leave_out_layers(base):
    vtw, pc = base.cost(Routing(variant="vtw", split=4)), base.cost(Routing(variant="pc", split=4))
    assert vtw["decoder"] < vtw["prefill"] < pc["prefill"]
    assert base.cost(Routing(split=4), FastV(2, 0.5))["decoder"] < base.cost(Routing(split=4))["decoder"]


def test_scaled_recipes_keep_what_is_not_asked_to_change():
    recipe = arms.scaled(arms.SIDE, 2.0, rate=1.0)
    assert (recipe.steps, recipe.rate, recipe.decay) == (2 * arms.SIDE.steps, 1.0, arms.SIDE.decay)
