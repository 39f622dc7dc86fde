import pytest
import torch

from llava_patch.hosts import anatomy
from llava_patch.tools.evidence.small import chain, training
from llava_patch.tools.evidence.small.chain import Chain
from llava_patch.tools.evidence.small.model import build
from llava_patch.tools.evidence.small.training import Recipe


@pytest.fixture
def model():
    return build(chain.VISION, chain.text(layers=2), chain.IMAGE, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fit_finds_the_least_of_a_parabola(optimizer):
    point = torch.nn.Parameter(torch.tensor([3.0]))
    losses = training.fit(lambda step: (point - 1).square().sum(), [point], Recipe(200, 0.1, optimizer, decay=0.0))
    assert len(losses) == 200 and losses[-1] < 1e-2 * losses[0]


def test_the_rate_rises_and_falls_as_the_recipe_says():
    recipe = Recipe(100, rate=1.0, warmup=9, floor=0.1)
    assert recipe.rate_at(0) == pytest.approx(0.1, rel=1e-3)
    assert recipe.rate_at(9) == max(recipe.rate_at(step) for step in range(100))
    assert 0.1 <= recipe.rate_at(99) < 0.11
    assert Recipe(100, rate=1.0, warmup=0, floor=1.0).rate_at(77) == 1.0


def test_gradients_are_shown_before_they_are_clipped():
    point, shown = torch.nn.Parameter(torch.tensor([100.0])), []
    recipe = Recipe(1, 1.0, "sgd", warmup=0, clip=1.0)
    training.fit(lambda step: point.square().sum(), [point], recipe, lambda step: shown.append(point.grad.item()))
    assert shown == [200.0] and point.item() == pytest.approx(99.0)


def test_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="adamw"):
        training.fit(lambda step: None, [torch.nn.Parameter(torch.zeros(1))], Recipe(1, optimizer="adam"))


def test_the_tower_learns_what_its_patches_show(model):
    words = anatomy.find(model).embed_tokens.weight[chain.LETTER : chain.LETTER + chain.BLANK].detach().clone()
    share = training.pretrain_tower(model, Chain(0).patches(32), chain.BLANK + 1, Recipe(100), 0, words)
    assert share > 0.6  # half of the patches are blank: 0.53 for who knows that alone


def test_several_questions_are_answered_as_if_each_were_alone(model):
    batch = Chain(0).batch(2, questions=3)
    model.lm_head.weight.data.mul_(50)
    with torch.no_grad():
        together = training.run_questions(model, batch.questions()).logits[:, -3 * 3 :].unflatten(1, (3, 3))[:, :, -1]
        for asked in range(3):
            ids = torch.cat([batch.prefix, batch.prompts[:, asked]], 1)
            alone = model(input_ids=ids, pixel_values=batch.pixels).logits[:, -1]
            torch.testing.assert_close(together[:, asked], alone, atol=1e-4, rtol=1e-4)


def test_deep_supervision_reads_the_layer_that_it_names(model):
    asked = Chain(0).batch(2, questions=2).questions({0: 1})
    model.requires_grad_(True)
    training.question_loss(model, asked, training.run_questions(model, asked)).backward()
    plain = training.question_loss(model, asked, training.run_questions(model, asked), lens=False)
    assert plain < training.question_loss(model, asked, training.run_questions(model, asked))
    parts = anatomy.find(model)
    weight = parts.layers[1].self_attn.q_proj.weight
    model.zero_grad()
    lens = training.question_loss(model, asked, training.run_questions(model, asked))
    (lens - training.question_loss(model, asked, training.run_questions(model, asked), lens=False)).backward()
    assert weight.grad is None or weight.grad.abs().max() < 1e-6


def test_training_the_decoder_leaves_the_tower_as_it_is(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    task = Chain(0)
    losses = training.train_decoder(model, lambda: task.batch(2, 2).questions({0: 1}), Recipe(3))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(before[name], weight)}
    assert len(losses) == 3 and not any("vision_tower" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed) and any("layers.1" in name for name in changed)
