"""What one version of transformers wrote opens on the others: here, files of 5.24.

They were written with torch 2.13.0 on CPU and transformers 5.24.0, from the models of test_written_before.py: their
base saved again, two adapters on it, and a full checkpoint of each host, whose added weights moved; `expected.json`
has a few logits of each. Files of 4.57 are those of test_written_before.py.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llava_patch import DeepStack, FastV, Routing, SkipLinks, get_handle

from .test_written_before import hf, hf_inputs, llava_inputs

WRITTEN = Path(__file__).resolve().parent / "written_newest"
SKIP = SkipLinks(layers=(1, 2), detach=1)
METHODS = {
    "adapters/skip_links_lf": {"fusion": SKIP, "routing": Routing(split=2)},
    "adapters/deep_stack_fastv": {
        "fusion": DeepStack(taps=(1, 2), start=1, interval=1, detach=(0,)), "pruning": FastV(2, 0.5),
    },
    "hf": {"fusion": SKIP, "routing": Routing("kv", split=2, freeze="none")},
}  # fmt: skip


@pytest.fixture(autouse=True)
def written(tmp_path, monkeypatch):
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")


def _agrees(name, model, inputs):
    with torch.no_grad():
        found = model.float().eval()(**inputs).logits[0, -1, :8]
    expected = torch.tensor(json.loads(Path("expected.json").read_text())["logits"][name])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), f"{name}: {found}, then {expected}"


@pytest.mark.parametrize("name", METHODS)
def test_hugging_faces_host(name):
    model = hf(name)
    handle = get_handle(model)
    assert handle.applied() == METHODS[name]
    _agrees(name, model, hf_inputs(handle.tokens_per_image))


def test_the_original_host_with_a_trained_tower():
    pytest.importorskip("llava")
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained("llava", dtype=torch.float32)
    model.get_vision_tower().load_model()
    handle = get_handle(model)
    assert handle.trained_tower and handle.routing == Routing(split=2, fusion_layers=(2, 3), freeze="none")
    _agrees("llava", model, llava_inputs())
