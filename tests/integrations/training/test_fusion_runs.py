"""Both stages of LLaVA's unmodified train.py with fusions that do not only widen the projector."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from llava_patch import DeepStack, DenseConnector, DirectFusion, SkipLinks, patch
from llava_patch.core.errors import CheckpointError
from llava_patch.integrations.training.llava import prepare
from llava_patch.integrations.training.stage1 import check_projector
from tests.support.tiny_train import TRAIN, arguments, losses, make_data, ok, run


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
    assert refused.returncode != 0 and "was trained with DeepStack(" in refused.stderr
    assert "but this run has SkipLinks(stride=2" in refused.stderr and not (tmp_path / "three").exists()

    # LoRA on the finished model: LLaVA's loader brings back the base's fusion and tower with what LoRA's run trained
    out = tmp_path / "llava-lora"
    lora = {"lora_enable": True, "lora_r": 8, "lora_alpha": 16, "mm_projector_lr": 1e-2, "bf16": True}
    base = arguments(data, 2, out, steps=2, model_name_or_path=second, pretrain_mm_mlp_adapter=None, **lora)
    ok(run([TRAIN, *base, *_flags('DeepStack.train_tower = "frozen"', *stack)]))
    beside = torch.load(out / "non_lora_trainables.bin", weights_only=True)
    stacked = {n.removeprefix("base_model.model."): t for n, t in beside.items() if "_stack" in n}
    assert len(stacked) == 4  # it trains with the projector, which LLaVA's script switches on
    from llava.model.builder import load_pretrained_model

    loaded = load_pretrained_model(str(out), str(second), "llava-lora", device_map="cpu", device="cpu")[1].state_dict()
    tower = {n: t for n, t in weights.items() if "vision_tower" in n}
    assert all(torch.equal(loaded[n], t.half()) for n, t in {**stacked, **tower}.items()) and len(tower) > 100


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


def _saved(folder, fusion, tensors):
    from llava_patch.settings.methods import to_dict

    folder.mkdir()
    torch.save({f"model.{n}": torch.zeros(shape) for n, shape in tensors.items()}, folder / "mm_projector.bin")
    record = {"format": 1, "fusion": to_dict(fusion), "routing": None, "pruning": None, "form": "full"}
    (folder / "llava_patch.json").write_text(json.dumps(record))
    return str(folder / "mm_projector.bin")


def test_a_projector_of_the_same_width_but_another_fusion_is_refused(tmp_path):
    wide = {"mm_projector.0.weight": (4, 12)}
    path = _saved(tmp_path / "dci", DenseConnector(), wide)
    assert check_projector(path, DenseConnector(detach=(), train_tower="all"))  # what trains may differ
    for other in (DenseConnector(kind="sci"), DirectFusion(), SkipLinks(), None):
        with pytest.raises(CheckpointError, match=r"was trained with DenseConnector\(.*give it the same settings"):
            check_projector(path, other)
    (tmp_path / "dci" / "llava_patch.json").unlink()
    assert check_projector(path, DirectFusion())  # nobody knows better
    both = {"mm_projector.0.weight": (4, 4), "mm_projector_stack.0.weight": (4, 4)}
    path = _saved(tmp_path / "stack", DeepStack(), both)
    with pytest.raises(CheckpointError, match=r"was trained with DeepStack\("):
        check_projector(path, DeepStack(start=2))
    with pytest.raises(CheckpointError, match=r"projector='own'\), but this run has DeepStack\(.*projector='shared'\)"):
        check_projector(path, DeepStack(projector="shared"))
    (tmp_path / "stack" / "llava_patch.json").unlink()
    with pytest.raises(CheckpointError, match="holds DeepStack's projector, but this run has no fusion"):
        check_projector(path, None)


@pytest.mark.parametrize("trains", [True, False])
def test_deep_stacks_projector_trains_where_the_projector_does(host, trains):
    """LLaVA's script sets the flags of the projector alone."""
    handle = patch(host.model, fusion=DeepStack(taps=(2, 4), start=0))
    host.model.requires_grad_(False)
    handle.anatomy.projector.requires_grad_(trains)
    for parameter in handle.adapter_parameters()[4:]:
        torch.nn.init.ones_(parameter)  # it was trained: one that is zero and stays so is refused
        parameter.requires_grad_(not trains)
    prepare(host.model, SimpleNamespace(tune_mm_mlp_adapter=False), None, None)
    assert [p.requires_grad for p in handle.adapter_parameters()] == [trains] * 8
    handle.remove()


def test_deep_stacks_shared_projector_keeps_the_scripts_flags(host):
    handle = patch(host.model, fusion=DeepStack(taps=(2, 4), start=0, projector="shared"))
    host.model.requires_grad_(False)
    handle.anatomy.projector.requires_grad_(True)
    prepare(host.model, SimpleNamespace(tune_mm_mlp_adapter=False), None, None)
    assert [n for n, p in host.model.named_parameters() if p.requires_grad] == handle.trainable()
    assert len(handle.trainable()) == 4 and all("projector." in name for name in handle.trainable())
    handle.remove()
