import torch

from llava_patch.hosts import anatomy
from llava_patch.tools.evidence.small import chain
from llava_patch.tools.evidence.small.model import Text, Vision, build, weights

VISION, TEXT = Vision(image=28, patch=14, width=16, layers=2), Text(20, width=16, layers=2, wide=16)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, again, other = (build(VISION, TEXT, 2, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_building_leaves_torchs_own_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    build(VISION, TEXT, 2, 0)
    assert torch.equal(torch.rand(1), expected)


def test_sizes_are_those_that_were_asked_for():
    model = build(Vision(image=56, patch=14, width=32, layers=3, feature_layer=-1), TEXT, 2, 0)
    parts = anatomy.find(model)
    assert (parts.n_blocks, parts.main_block, parts.vision_width, parts.grid) == (3, 3, 32, (4, 4))
    assert len(parts.layers) == 2 and parts.embed_tokens.weight.shape == (20, 16)


def test_a_new_model_answers_near_the_uniform_distribution():
    model = build(chain.VISION, chain.text(layers=2), chain.IMAGE, 0)
    with torch.no_grad():
        logits = model(**chain.Chain(0).batch(4).inputs()).logits
    assert logits[:, -1].std() < 0.5


def test_copied_weights_do_not_change_with_the_model():
    model = build(VISION, TEXT, 2, 0)
    kept = weights(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert not torch.equal(kept["lm_head.weight"], model.lm_head.weight)
