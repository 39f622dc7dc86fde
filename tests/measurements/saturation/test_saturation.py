"""Saturation against the naive computation with full attention tensors and hidden states."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import torch

from llava_patch import Routing, patch
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.saturation.measure import measure_sample, measure_saturation
from llava_patch.measurements.saturation.result import Saturation, SaturationResult
from tests.support import tiny


def naive(model: torch.nn.Module, sample: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The definition, written out: eager attention, all tensors of all layers at once."""
    anatomy = find(model)
    image = torch.zeros(sample["input_ids"].shape[1] + (tiny.PATCHES - 1) * (anatomy.host == "llava")).bool()
    image[2 : 2 + tiny.PATCHES] = True
    outputs = []
    hooks = [layer.register_forward_hook(lambda m, a, o: outputs.append(o)) for layer in anatomy.layers]
    with torch.no_grad():
        out = model(**sample, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    states = [out.hidden_states[0]] + [o[0] if isinstance(o, tuple) else o for o in outputs]
    queries = torch.arange(len(image))[2 + tiny.PATCHES :]
    logits = [model.lm_head(anatomy.norm(s))[0].log_softmax(-1) for s in states[1:]]
    kl = [(logits[-1].exp() * (logits[-1] - value)).sum(-1) for value in logits]
    cosine = [torch.cosine_similarity(a[0], b[0], dim=-1) for a, b in itertools.pairwise(states)]
    return {
        "head_mass": [a[0][:, queries][:, :, image].sum(-1).mean(-1).tolist() for a in out.attentions],
        "image_cosine": [c[image].mean().item() for c in cosine],
        "text_cosine": [c[~image].mean().item() for c in cosine],
        "image_kl": [value[image].mean().item() for value in kl],
        "text_kl": [value[~image].mean().item() for value in kl],
    }


@pytest.mark.parametrize("chunk", [1, 3, 128])
def test_equals_the_naive_computation_with_full_attention(host: Any, chunk: int) -> None:
    make_model, make_sample = host
    sample = make_sample()
    expected = naive(make_model(attention="eager"), sample)
    got = measure_sample(find(make_model(attention="sdpa")), sample, Saturation(chunk=chunk))
    for name, values in expected.items():
        torch.testing.assert_close(torch.tensor(getattr(got, name)), torch.tensor(values), atol=1e-5, rtol=0, msg=name)
    assert got.image_kl[-1] == 0 and got.text_kl[-1] == 0
    assert all(0 < mass < 1 for mass in got.mass)


@pytest.mark.parametrize("at", ["layer", "norm"])
def test_what_is_not_finite_is_not_taken_for_absent(host: Any, at: str) -> None:
    make_model, make_sample = host
    model = make_model()
    weight = find(model).layers[2].mlp.down_proj.weight if at == "layer" else find(model).norm.weight
    with torch.no_grad():
        weight.fill_(math.nan)
    where = 2 if at == "layer" else 0  # only the logit lens, which has the norm in every layer
    with pytest.raises(HostError, match=f"layer {where} are not finite in float32: the weights are not either"):
        measure_saturation(model, [make_sample()], progress=False)


def test_several_samples_are_averaged_and_unusable_ones_counted(host: Any) -> None:
    make_model, make_sample = host
    model = make_model()
    blind = {k: v for k, v in make_sample(seed=3).items() if k not in ("pixel_values", "images")}
    samples = [make_sample(seed=1, after=3), blind, make_sample(seed=2, after=9), make_sample(after=0)]
    result = measure_saturation(model, iter(samples), progress=False)
    assert result.samples == 2 and result.skipped == {"no image": 1, "no text after the image": 1}
    each = [measure_sample(find(model), s) for s in (samples[0], samples[2])]
    for layer in range(result.n_layers):
        assert result.curves.text_kl[layer] == pytest.approx(sum(c.text_kl[layer] for c in each) / 2)
        assert result.curves.mass[layer] == pytest.approx(sum(c.mass[layer] for c in each) / 2)
    with pytest.raises(InputError, match=r"no usable sample.*1 with no image"):
        measure_saturation(model, [blind], progress=False)
    assert measure_saturation(model, samples, Saturation(max_samples=1), progress=False).samples == 1


def snapshot(model: torch.nn.Module) -> dict[str, Any]:
    return {
        name: (
            sorted(vars(m)), m.training, len(m._forward_hooks), len(m._forward_pre_hooks),
        )
        for name, m in model.named_modules()
    }  # fmt: skip


def test_leaves_no_hook_and_no_flag_behind_also_after_an_exception(host: Any) -> None:
    make_model, make_sample = host
    model = make_model()
    model.train()
    find(model).norm.eval()  # a flag of its own must survive
    before = snapshot(model)
    measure_saturation(model, [make_sample()], progress=False)
    assert snapshot(model) == before

    def fail(*args: Any) -> None:
        raise RuntimeError("broken layer")

    hook = find(model).layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        measure_saturation(model, [make_sample()], progress=False)
    hook.remove()
    assert snapshot(model) == before


def test_routed_model_has_no_image_in_text_only_layers(host: Any) -> None:
    make_model, make_sample = host
    model, sample = make_model(), make_sample()
    stock = measure_sample(find(model), sample)
    with patch(model, routing=Routing(split=2)):
        result = measure_saturation(model, [sample], progress=False)
        assert "side_branch" in dict(find(model).decoder.named_children())
    curves = result.curves
    assert curves.image_present == [True, True, False, False, True]
    assert curves.mass[2:4] == [0, 0] and curves.mass[4] > 0
    assert math.isnan(curves.image_kl[2]) and math.isnan(curves.image_cosine[3])
    assert curves.image_kl[4] == 0 and not math.isnan(curves.text_kl[3])
    assert curves.mass[:2] == stock.mass[:2] and curves.text_cosine[:2] == stock.text_cosine[:2]
    assert (
        result.recommended_split is None
        and "routed (lf, split 2), and layers 2..3 have no image states" in result.recommendation.reason
    )


def test_sliding_window_attention_is_followed() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    from llava_patch.measurements.trace import traced

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, initializer_range=0.2,
    )  # fmt: skip
    config._attn_implementation = "eager"
    mistral = MistralForCausalLM(config).eval()
    hf = tiny.hf_model(layers=2)
    hf.model.language_model, hf.lm_head = mistral.model, mistral.lm_head
    anatomy, image = find(hf), torch.tensor([False, True, True, True] + [False] * 6)
    sample = {"input_ids": torch.zeros(1, 10, dtype=torch.long)}
    with torch.no_grad(), traced(anatomy, sample, chunk=2) as seen:
        seen.seen.image = image
        out = mistral.model(inputs_embeds=torch.randn(1, 10, 32), output_attentions=True)
    for layer, attention in enumerate(out.attentions):
        expected = attention[0][:, 4:][:, :, image].sum(-1).mean(-1)
        torch.testing.assert_close(seen.mass[layer], expected, atol=1e-5, rtol=0)


def test_result_is_written_as_json_and_figure(tmp_path: Any) -> None:
    result = measure_saturation(tiny.hf_model(), [tiny.hf_sample()], progress=True)
    json_path, png_path = result.save(tmp_path / "new")
    values = json.loads(json_path.read_text())
    assert values["samples"] == 1 and len(values["head_mass"]) == 5 and len(values["head_mass"][0]) == 4
    assert values["reason"] and values["settings"]["transition_share"] == 0.5
    layer = values["text_transition_layer"]
    assert layer is None or values["text_transition_percent"] == 100 * layer / 5
    assert png_path.read_bytes().startswith(b"\x89PNG") and png_path.stat().st_size > 10_000
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["saturation.json", "saturation.png"]
    again = SaturationResult.from_dict(values)
    assert again.to_dict() == values and again.summary() == result.summary()
    head, rows = result.table()
    assert len(rows) == 5 and all(len(row) == len(head) for row in rows) and rows[4][0] == "4"
    assert "1 sample)" in result.summary() and "at layer 0" in result.summary()


@pytest.mark.parametrize(
    "field, value",
    [
        ("transition_share", 1.0),
        ("mass_tolerance", 0),
        ("fall_share", "x"),
        ("max_samples", 0),
        ("chunk", True),
        ("save_every", 0),
    ],
)
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"Saturation.{field} = "):
        Saturation(**{field: value})


def test_batches_padding_and_pruned_layers_are_refused() -> None:
    model, sample = tiny.hf_model(), tiny.hf_sample()
    batch = {k: torch.cat([v, v]) for k, v in sample.items()}
    with pytest.raises(InputError, match="got a batch of 2"):
        measure_saturation(model, [batch], progress=False)
    padded = {**sample, "attention_mask": torch.cat([torch.zeros(1, 1), torch.ones(1, 10)], 1).long()}
    with pytest.raises(InputError, match="without padding"):
        measure_saturation(model, [padded], progress=False)
    drop = find(model).layers[1].register_forward_hook(lambda m, a, o: o[:, :-1])
    with pytest.raises(HostError, match="layer 1 sees 10 tokens of 11 expected"):
        measure_saturation(model, [sample], progress=False)
    drop.remove()
