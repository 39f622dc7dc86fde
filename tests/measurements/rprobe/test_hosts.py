"""The same probe on the original llava package."""

import pytest
import torch
from transformers import CLIPVisionModel

from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.settings import RProbe
from tests.support.probes import SIDE, Characters, processor, tiny_model


def llava_twin(model, folder):
    """A llava model with the weights of the HF model."""
    language_model = pytest.importorskip("llava.model.language_model.llava_llama")
    config = model.config
    tower = CLIPVisionModel(config.vision_config)
    tower.load_state_dict(model.model.vision_tower.state_dict())
    tower.save_pretrained(folder)
    processor().save_pretrained(folder)
    twin = language_model.LlavaLlamaForCausalLM(
        language_model.LlavaConfig(
            **{k: v for k, v in config.text_config.to_dict().items() if k != "model_type"},
            mm_vision_tower=str(folder),
            mm_hidden_size=config.vision_config.hidden_size,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            mm_vision_select_feature="patch",
            tune_mm_mlp_adapter=False,
        )
    )
    twin.get_vision_tower().load_model()
    inner, projector = model.model, model.model.multi_modal_projector
    missing = twin.model.load_state_dict(inner.language_model.state_dict(), strict=False).missing_keys
    assert all(key.startswith(("mm_projector", "vision_tower")) for key in missing)
    twin.model.mm_projector[0].load_state_dict(projector.linear_1.state_dict())
    twin.model.mm_projector[2].load_state_dict(projector.linear_2.state_dict())
    return twin.float()


def test_both_hosts_give_the_same_numbers(tmp_path):
    model = tiny_model()
    settings = RProbe(steps=8, batch_size=8, train_pages=24, heldout_pages=6, threshold=1e-6)
    expected = run_rprobe(model, processor(), Characters(), settings, progress=False)
    twin = llava_twin(model, tmp_path)
    before = {k: v.clone() for k, v in twin.state_dict().items()}
    with torch.inference_mode():
        result = run_rprobe(twin, processor(), Characters(), settings, progress=False)
    assert (expected.facts["host"], result.facts["host"]) == ("hf", "llava")
    assert result.losses == pytest.approx(expected.losses, rel=1e-4)
    assert result.mse == pytest.approx(expected.mse, rel=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    assert result.examples[0].original.shape == (SIDE, SIDE, 3)
