"""Both stages of LLaVA's unmodified train.py with fusions that do not only widen the projector."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny_train import TRAIN, arguments, losses, make_data, ok, run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("train"))


def _flags(*bindings):
    return [word for binding in bindings for word in ("--gin_param", binding)]


@pytest.mark.timeout(600)
def test_deep_stack_through_both_stages(data, tmp_path):
    """Stage 1 saves both projectors, stage 2 takes them and trains the tower, and the result loads without a flag."""
    stack = ["DeepStack.start = 1", "DeepStack.interval = 1", "DeepStack.detach = (0,)"]
    first, second = tmp_path / "one", tmp_path / "llava-two"
    ok(run([TRAIN, *arguments(data, 1, first, learning_rate=1e-2), *_flags(*stack)]))
    saved = torch.load(first / "mm_projector.bin", weights_only=True)
    names = [f"model.mm_projector{kind}.{i}.{k}" for kind in ("", "_stack") for i in (0, 2) for k in ("weight", "bias")]
    assert set(names) <= set(saved)
    assert saved["model.mm_projector_stack.2.weight"].abs().max() > 1e-3  # it started at zero

    train = arguments(data, 2, second, pretrain_mm_mlp_adapter=first / "mm_projector.bin", learning_rate=1e-6)
    ok(run([TRAIN, *train, *_flags(*stack, 'DeepStack.train_tower = "all"')]))
    assert len(losses(second)) == 3 and all(math.isfinite(loss) and loss > 0 for loss in losses(second)), losses(second)
    weights = load_file(second / "model.safetensors")
    for name in names:  # three steps of 1e-6 away from stage 1
        assert torch.allclose(weights[name], saved[name].float(), atol=1e-5), name
    record = json.loads((second / "llava_patch.json").read_text())
    assert (record["fusion"]["method"], record["fusion"]["detach"]) == ("DeepStack", [0])
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    from llava_patch import get_handle

    model = LlavaLlamaForCausalLM.from_pretrained(second)
    assert get_handle(model).program().injections == (1, 2, 3, 4)
    assert torch.equal(model.model.mm_projector_stack[2].weight, weights["model.mm_projector_stack.2.weight"])

    # stage 1's file under another fusion
    refused = run([TRAIN, *arguments(data, 2, tmp_path / "three", pretrain_mm_mlp_adapter=first / "mm_projector.bin"),
                   *_flags("SkipLinks.stride = 2")])  # fmt: skip
    assert refused.returncode != 0 and "use the fusion settings that it was trained with" in refused.stderr
    assert not (tmp_path / "three").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("bindings", "channels"),
    [
        (["DenseConnector.merge_size = 2"], 3 * 4 * 32),
        (['DenseConnector.kind = "sti"', "DenseConnector.groups = (2, 5)"], 32),
    ],
    ids=["merged", "sti"],
)  # fmt: skip
def test_other_numbers_of_tokens_train(data, tmp_path, bindings, channels):
    out = tmp_path / "one"
    text = ok(run([TRAIN, *arguments(data, 1, out, steps=2), *_flags(*bindings)]))
    assert "tokens instead of 16" in text
    saved = torch.load(out / "mm_projector.bin", weights_only=True)
    assert saved["model.mm_projector.0.weight"].shape == (64, channels)
    assert len(losses(out)) == 2
