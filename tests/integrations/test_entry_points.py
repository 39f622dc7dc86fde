"""LLaVA's unmodified evaluation scripts and its command-line chat on patched checkpoints: they answer patched."""

import io
import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from llava_patch import Routing, SkipLinks, patch
from tests.support.checkpoints import trained
from tests.support.models import multiplies
from tests.support.release import write_fileset
from tests.support.tiny_train import TEXT, VISION

QUESTION, COUNT = "What is the number in the image?", 6


def precision():
    """The scripts' own, or single where this torch multiplies no halves on the CPU."""
    return torch.float16 if multiplies(torch.float16) else torch.float32


def load(folder):
    from llava.model.builder import load_pretrained_model

    return load_pretrained_model(str(folder), None, folder.name, device_map="cpu", device="cpu")


def ask(folder, image):
    """The answer in LLaVA's own steps."""
    from llava.constants import IMAGE_TOKEN_INDEX
    from llava.conversation import conv_templates
    from llava.mm_utils import process_images, tokenizer_image_token

    tokenizer, model, processor, _ = load(folder)
    talk = conv_templates["llava_v1"].copy()
    talk.append_message(talk.roles[0], f"<image>\n{QUESTION}")
    talk.append_message(talk.roles[1], None)
    ids = tokenizer_image_token(talk.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    pixels = process_images([image], processor, model.config).half()
    dtype = precision()
    said = model.to(dtype).generate(
        ids, images=pixels.to(dtype), image_sizes=[image.size], do_sample=False, max_new_tokens=COUNT
    )
    return tokenizer.batch_decode(said, skip_special_tokens=True)[0].strip()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An image with a question, and one model stock, as a full checkpoint and as an adapter."""
    root = tmp_path_factory.mktemp("scripts")
    pixels = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "one.png")
    (root / "questions.jsonl").write_text(json.dumps({"question_id": 1, "image": "one.png", "text": QUESTION}) + "\n")
    files = write_fileset(root / "set", vision=VISION, text=TEXT, vocab_size=512)
    tokenizer, model, _, _ = load(files.llava)
    model.float().get_vision_tower().float()
    handle = patch(model, fusion=SkipLinks(stride=2), routing=Routing(split=3))
    trained(handle.anatomy.decoder.side_branch, 0.3)
    trained(handle.anatomy.projector, 0.3)
    folders = {"stock": files.llava}
    for form in ("full", "adapter"):
        folders[form] = handle.save(root / f"llava-v1-{form}", form=form)
        tokenizer.save_pretrained(folders[form])
    return root, folders


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs a module as `python -m` does, on a machine without CUDA too, with short answers; returns what it printed."""
    from llava.model import LlavaLlamaForCausalLM

    for layer in (torch.nn.Linear, torch.nn.LayerNorm):  # the scripts switch this off for good
        monkeypatch.setattr(layer, "reset_parameters", layer.reset_parameters)
    generate, to = LlavaLlamaForCausalLM.generate, torch.Tensor.to
    short = {"max_new_tokens": COUNT}

    def answer(model, *args, images, **more):
        dtype = precision()
        return generate(model.to(dtype), *args, images=images.to(dtype), **{**more, **short})

    monkeypatch.setattr(LlavaLlamaForCausalLM, "generate", answer)
    monkeypatch.setitem(sys.modules, "shortuuid", SimpleNamespace(uuid=lambda: "0"))
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, *args, **more: tensor)
        monkeypatch.setattr(
            torch.Tensor, "to",
            lambda tensor, *args, **more: to(tensor, *args, **(more | ({"device": "cpu"} if "device" in more else {}))),
        )  # fmt: skip

    def run(module, *flags, typed=""):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [module, *map(str, flags)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        runpy.run_module(module, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_they_answer_patched(data, script, form, tmp_path):
    root, folders = data
    image = Image.open(root / "one.png").convert("RGB")
    expected = ask(folders[form], image)
    assert expected and expected != ask(folders["stock"], image)
    same = ["--model-path", folders[form], "--temperature", 0]
    for module in ("model_vqa", "model_vqa_loader"):
        files = ["--image-folder", root, "--question-file", root / "questions.jsonl", "--conv-mode", "llava_v1"]
        script(f"llava.eval.{module}", *same, *files, "--answers-file", tmp_path / "a" / module)
        assert json.loads((tmp_path / "a" / module).read_text())["text"] == expected, module
    assert expected in script("llava.eval.run_llava", *same, "--image-file", root / "one.png", "--query", QUESTION)
    chat = ["--image-file", root / "one.png", "--device", "cpu"]
    assert expected in script("llava.serve.cli", *same, *chat, typed=f"{QUESTION}\n")
