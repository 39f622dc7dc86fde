"""Loading and comparing checkpoint folders of both hosts, in full precision."""

import inspect
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llava_patch.core.weights import open_weights
from tests.support.models import IMAGE, Host

SAMPLES = [(2, IMAGE, 5), (3, IMAGE, 4)]


def host_of(folder):
    return "llava" if "mm_vision_tower" in config(folder) else "hf"


def config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def load(folder):
    """The model with the host's own from_pretrained; llava's without the builder, which rounds to half precision."""
    if host_of(folder) == "hf":
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32).eval()
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained(folder)
    model.get_vision_tower().load_model()
    return model.float().eval()


def built(folder, base=None):
    """The model by llava's builder; LLaVA-NeXT's knows GPUs and "auto", and asks for flash attention."""
    from llava.model.builder import load_pretrained_model

    takes_device = "device" in inspect.signature(load_pretrained_model).parameters
    more = (
        {"device_map": "cpu", "device": "cpu"}
        if takes_device
        else {"device_map": "auto", "attn_implementation": "sdpa"}
    )
    base = None if base is None else str(base)
    return load_pretrained_model(str(folder), base, "llava-v1.5-small", **more)[1]


def batch(name, image_token=512):
    rows = Host(name, torch.nn.Linear(1, 1)) if name == "hf" else Host(name, _Configured())
    inputs = rows.batch(SAMPLES).inputs
    if name == "hf":
        inputs["input_ids"][inputs["input_ids"] == 95] = image_token
    return inputs


class _Configured:
    class config:
        pass


def logits(model):
    name = "llava" if hasattr(model, "get_vision_tower") else "hf"
    with torch.no_grad():
        return model(**batch(name)).logits[..., :512]


def trained(module, scale=0.05):
    """Values that differ from the base and are exact in half precision."""
    for i, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.half().float())


def tensors(folder):
    return {name: load() for name, load in open_weights(str(folder)).items()}


def same_bits(one, other):
    """Equal names, bits and types; files that transformers 5 wrote leave out CLIP's level `vision_model`."""
    one, other = ({name.replace("vision_model.", ""): t for name, t in each.items()} for each in (one, other))
    assert set(one) == set(other), sorted(set(one) ^ set(other))
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


def edited(source, out, *, settings=None, config_values=None, change=None):
    """A copy of a full checkpoint with other settings in its record, another config, or changed tensors."""
    shutil.copytree(source, out)
    values = config(out) | (config_values or {})
    if settings is not None:
        values["llava_patch"] = {"format": 1, "fusion": None, "routing": None, "pruning": None, **settings}
        (out / "llava_patch.json").write_text(json.dumps({**values["llava_patch"], "form": "full"}))
    (out / "config.json").write_text(json.dumps(values))
    if change is not None:
        for path in out.glob("model*.safetensors"):
            held = load_file(path)
            change(held)
            save_file({k: v.contiguous() for k, v in held.items()}, path, {"format": "pt"})
    return out
