"""Adapters of a model whose vocabulary is not the base's, and of one that is not its base any more."""

import copy

import pytest
import torch
from safetensors.torch import load_file

from llava_patch import Routing, get_handle, load, patch
from llava_patch.core.errors import CheckpointError
from llava_patch.hosts.compat import parameters_of
from llava_patch.patching.checkpoint import WEIGHTS_FILE
from llava_patch.patching.vocabulary import resize_for

from .test_checkpoint import _batch, _load, files  # noqa: F401

SPLIT = {"routing": Routing(split=3)}


def _logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("name", ["hf", "llava"])
@pytest.mark.parametrize("more", [2, -7], ids=["grown", "cut"])
def test_a_resized_vocabulary_comes_back(name, more, files, tmp_path):  # noqa: F811
    model = _load(name, files).float()
    handle = patch(model, **SPLIT)
    rows = model.get_input_embeddings().weight.shape[0]
    if name == "llava" and more > 0:  # as its script does it, for which its loader makes room
        model.config.mm_use_im_start_end = True
    model.resize_token_embeddings(rows + more)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()  # llava's loader rounds to half precision
    batch = _batch(name, model)
    expected = _logits(model, batch)
    handle.save(tmp_path / "llava-adapter")
    held = load_file(tmp_path / "llava-adapter" / WEIGHTS_FILE)
    assert sum(len(tensor) == rows + more for tensor in held.values()) == 2
    base = _load(name, files).float()
    load(base, tmp_path / "llava-adapter")
    assert torch.equal(_logits(base, batch), expected)
    if name == "hf":
        again = type(model).from_pretrained(tmp_path / "llava-adapter").float().eval()
    elif more > 0:
        from llava.model.builder import load_pretrained_model

        folder = str(tmp_path / "llava-adapter")
        again = load_pretrained_model(folder, None, "llava-adapter", device_map="cpu", device="cpu")[1].float().eval()
        again.get_vision_tower().float()
    else:
        return
    assert torch.equal(_logits(again, batch), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_whose_base_lora_was_merged_into_is_refused(dtype, files, tmp_path):  # noqa: F811
    peft = pytest.importorskip("peft")
    model = _load("hf", files).to(dtype)
    patch(model, **SPLIT).save(tmp_path / "adapter")  # rounded to another precision, a base is the same base
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r".*language_model\.layers\.5.*q_proj"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    handle = get_handle(model.merge_and_unload())
    with pytest.raises(CheckpointError, match=r'layers\.5\.self_attn\.q_proj\.weight is not as in .* form="full"'):
        handle.save(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    handle.save(tmp_path / "full", form="full")


def test_a_resized_model_is_not_kept(host):
    """What functions take is remembered by function: of a model's own method that would keep the model."""
    before = parameters_of.cache_info().currsize
    embedding = host.model.get_input_embeddings().weight
    name = next(name for name, p in host.model.named_parameters() if p is embedding)
    for more in (2, 4):
        model = copy.deepcopy(host.model)
        resize_for(model, {name: torch.zeros(len(embedding) + more, embedding.shape[1])})
        assert len(model.get_input_embeddings().weight) == len(embedding) + more
    assert parameters_of.cache_info().currsize <= before + 1
