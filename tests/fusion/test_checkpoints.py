"""Every fusion comes back from adapters and full checkpoints through the hosts' own loaders; others are refused."""

import inspect
import json
import shutil

import pytest
import torch
import transformers

import llava_patch
from llava_patch import DeepStack, DenseConnector, DirectFusion, SkipLinks, get_handle, patch
from llava_patch.core.errors import CheckpointError, SettingError
from tests.support import checkpoints
from tests.support.fusions import ALL, TOKENS, randomise
from tests.support.models import Host, needs_hf
from tests.support.release import write_fileset

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_fileset(tmp_path_factory.mktemp("set"), vision=VISION, text=TEXT, vocab_size=512)


@pytest.fixture(params=["hf", "llava"])
def name(request):
    return request.param


def _load(name, path):
    if name == "hf":
        needs_hf()
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration.from_pretrained(path).eval()
    model = checkpoints.built(path).float()
    model.get_vision_tower().float()
    return model.eval()


@torch.no_grad()
def _round(model):
    """Make weights what llava's loader makes of them."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())


@torch.no_grad()
def _logits(name, model, tokens):
    host = Host(name, model, tokens)
    batch = host.batch([(2, "image", 5), (3, "image", 5)]).inputs
    if name == "hf":
        batch["input_ids"][batch["input_ids"] == 95] = model.config.image_token_id
    return model(**batch).logits


@pytest.mark.parametrize("form", ["adapter", "full"])
@pytest.mark.parametrize("case", ["skip", "free", "direct-all", "stack", "sti", "merge-skip", "merge-stack"])
def test_a_fused_model_comes_back(files, tmp_path, name, case, form, caplog):
    tokens = TOKENS.get(case, 16)
    model = _load(name, getattr(files, name))
    handle = patch(model, fusion=ALL[case])
    model.requires_grad_(False)
    randomise(handle)
    _round(model)
    expected = _logits(name, model, tokens)
    folder = tmp_path / "llava-saved"
    handle.save(folder, form=form)
    again = _load(name, folder)
    _round(again)  # LLaVA-NeXT's leaves the tower's as they are
    assert get_handle(again).fusion == ALL[case]
    # Up to 4.53 only the class of a model is asked what to leave unsaid.
    if "self._keys_to_ignore_on_load_unexpected" in inspect.getsource(transformers.PreTrainedModel):
        assert "were not used" not in caplog.text  # llava's tower comes later, which is no reason to frighten anybody
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    # Weights mapped from a file lie at other addresses, where the CPU's products may sum in another order.
    assert torch.allclose(_logits(name, again, tokens), expected, atol=2e-6)
    # a checkpoint whose fusion is not what is asked for
    other = DirectFusion(layers=(4,)) if case != "direct" else SkipLinks(stride=3)
    with pytest.raises(SettingError, match="already carries fusion"):
        patch(again, fusion=other)


@pytest.mark.parametrize("case", ["stack", "skip"])
def test_another_fusion_s_tensors_are_refused(files, tmp_path, name, case):
    model = _load(name, getattr(files, name))
    handle = patch(model, fusion=ALL[case])
    model.requires_grad_(False)
    handle.save(tmp_path / "saved")
    handle.remove()
    with patch(model, fusion=DirectFusion(layers=(4,))), pytest.raises(SettingError, match="already carries fusion"):
        llava_patch.load(model, tmp_path / "saved")
    settings = tmp_path / "saved" / "llava_patch.json"
    record = json.loads(settings.read_text())
    record["fusion"] = {"method": "DirectFusion", "layers": [4]}
    settings.write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        llava_patch.load(model, tmp_path / "saved")
    assert get_handle(model) is None


@pytest.mark.parametrize("case", ["sti", "merge-skip"])
def test_hf_processor_counts_the_fused_tokens(files, tmp_path, case):
    from PIL import Image
    from transformers import AutoProcessor

    model = _load("hf", files.hf)
    folder = tmp_path / "base"
    shutil.copytree(files.hf, folder)
    processor = AutoProcessor.from_pretrained(folder)
    image, text = Image.new("RGB", (56, 56), "white"), "<image>What is it?"
    handle = patch(model, fusion=ALL[case])
    handle.fit_processor(processor)
    handle.save(tmp_path / "saved", form="full")
    for counting in (processor, AutoProcessor.from_pretrained(tmp_path / "saved")):
        inputs = counting(images=image, text=text, return_tensors="pt")
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == handle.tokens_per_image
        assert torch.isfinite(model(**inputs).logits).all()
    handle.remove()
    unpatched = AutoProcessor.from_pretrained(folder)(images=image, text=text, return_tensors="pt")
    assert torch.isfinite(model(**unpatched).logits).all()


def test_detach_alone_may_not_differ_silently(files, tmp_path):
    """Detach changes no output, but it is part of the record."""
    model = _load("hf", files.hf)
    with patch(model, fusion=DenseConnector()), pytest.raises(SettingError, match="already carries fusion"):
        patch(model, fusion=DenseConnector(detach=()))
    assert DeepStack(detach=1) != DeepStack()
