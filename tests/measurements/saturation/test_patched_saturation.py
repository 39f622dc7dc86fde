"""Saturation of routed and pruned models against the attention that their layers really computed.

The oracle asks eager attention for its weights, layer by layer, and finds out which positions a layer runs on from the
rotary angles that the layer was given: neither goes through what is tested.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llava_patch import FastV, Routing, SkipLinks, patch
from llava_patch.hosts.anatomy import find
from llava_patch.hosts.compat import positions
from llava_patch.measurements.saturation.measure import measure_sample, measure_saturation, patch_on
from llava_patch.measurements.saturation.result import LATER, Curves
from llava_patch.measurements.trace import traced
from tests.support import models
from tests.support.models import IMAGE, LAYERS, Host, needs_hf, set_attention
from tests.support.routings import ALL

TWO_IMAGES = (2, IMAGE, 3, IMAGE, 4)
NAN = math.nan


@pytest.fixture(scope="module", params=["hf", "llava"])
def pair(request: Any, tmp_path_factory: Any) -> tuple[Host, Host]:
    """The same weights with eager attention and with sdpa."""
    if request.param == "hf":
        return Host("hf", models.hf_model("eager")), Host("hf", models.hf_model("sdpa"))
    pytest.importorskip("llava")
    folder = tmp_path_factory.mktemp("tower")
    eager, sdpa = models.llava_model(folder, "eager"), models.llava_model(folder, "sdpa")
    sdpa.load_state_dict(eager.state_dict())
    return Host("llava", eager), Host("llava", sdpa)


class Oracle:
    """What eager attention computed in one forward pass."""

    def __init__(self, model: nn.Module, inputs: dict[str, Any], image: Tensor) -> None:
        self.model, self.anatomy, self.image = model, find(model), image
        if positions.looks_up(self.anatomy.layers[0].self_attn):
            pytest.skip("layers of this transformers are told neither where their tokens are nor to give weights away")
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []
        self.places: list[Tensor] = []
        self.weights: list[Tensor] = []
        hooks = []
        for layer in self.anatomy.layers:
            hooks.append(layer.register_forward_hook(self._layer, with_kwargs=True))
            hooks.append(layer.self_attn.register_forward_hook(lambda m, a, o: self.weights.append(o[1][0])))
        with torch.no_grad():
            model(**inputs, use_cache=False)
        for hook in hooks:
            hook.remove()

    def _layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        decoder = self.anatomy.decoder
        angles = torch.cat(decoder.rotary_emb(args[0], torch.arange(len(self.image))[None]), -1)[0]
        mine = torch.cat(kwargs["position_embeddings"], -1)[0]
        self.places.append((mine[:, None] == angles[None]).all(-1).long().argmax(1))
        self.before.append(args[0][0])
        self.after.append((output[0] if isinstance(output, tuple) else output)[0])

    def keys(self, layer: int) -> Tensor:
        """Positions of a layer's keys; those of KV, which asks with text only, are what some whole layer holds."""
        count = self.weights[layer].shape[-1]
        for found in (self.places[layer], *self.places, torch.arange(len(self.image))):
            if len(found) == count:
                return found
        raise AssertionError(count)

    def curves(self) -> Curves:
        image, layers = self.image, range(len(self.anatomy.layers))
        behind = ~image & (image.long().cumsum(0) > 0)
        mass, cosines, kls = [], {True: [], False: []}, {True: [], False: []}
        final = {int(p): row for p, row in zip(self.places[-1], self._lens(-1), strict=True)}
        for i in layers:
            places = self.places[i]
            seen = self.weights[i][:, behind[places]][:, :, image[self.keys(i)]]
            mass.append(seen.sum(-1).mean(-1).tolist())
            cosine = torch.cosine_similarity(self.before[i], self.after[i], dim=-1)
            lens = {int(p): row for p, row in zip(places, self._lens(i), strict=True)}
            for kind in (True, False):
                cosines[kind].append(cosine[image[places] == kind].mean().item())
                both = [p for p in lens if p in final and bool(image[p]) == kind]
                kl = [(final[p].exp() * (final[p] - lens[p])).sum().item() for p in both]
                kls[kind].append(sum(kl) / len(kl) if kl else NAN)
        return Curves(
            cosines[True], cosines[False], mass, kls[True], kls[False],
            [float(image[self.places[i]].sum()) for i in layers], [float(image[self.keys(i)].sum()) for i in layers],
        )  # fmt: skip

    def _lens(self, layer: int) -> Tensor:
        with torch.no_grad():
            return self.model.lm_head(self.anatomy.norm(self.after[layer])).log_softmax(-1)


def same(got: Curves, expected: Curves) -> None:
    for name, values in dataclasses.asdict(expected).items():
        if name in LATER:  # test_knockout holds them to definitions of their own
            continue
        torch.testing.assert_close(
            torch.tensor(getattr(got, name)), torch.tensor(values), atol=1e-5, rtol=1e-5, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("case", ["stock", *ALL])
def test_every_patch_is_measured_as_its_layers_compute(pair: tuple[Host, Host], case: str) -> None:
    methods = ALL.get(case, {})
    eager, sdpa = pair
    batch = eager.batch([TWO_IMAGES])
    inputs = {k: v for k, v in batch.inputs.items() if k != "attention_mask"}
    with patch(eager.model, **methods) if methods else _nothing():
        expected = Oracle(eager.model, inputs, batch.image[0]).curves()
        same(measure_sample(find(eager.model), inputs), expected)
    with patch(sdpa.model, **methods) if methods else _nothing():
        got = measure_sample(find(sdpa.model), inputs)
        routed = patch_on(find(sdpa.model))
    same(got, expected)
    assert got.text_kl[-1] == 0 and (got.image_kl[-1] == 0 or math.isnan(got.image_kl[-1]))
    assert (routed is None) == (case == "stock")


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *args: Any) -> None: ...


def test_kept_tokens_and_keys_without_states_are_counted(pair: tuple[Host, Host]) -> None:
    host = pair[1]
    inputs = host.batch([TWO_IMAGES]).inputs
    with patch(host.model, pruning=FastV(layer=2, ratio=0.75)):
        result = measure_saturation(host.model, [inputs], progress=False)
    assert result.curves.image_keys == result.curves.image_states == [32, 32, 8, 8, 8, 8]
    assert result.patch.prune_at == 2 and result.split is None and result.recommended_split is None
    assert "pruned (FastV, 75% of the image tokens at layer 2)" in result.recommendation.reason
    assert result.to_dict()["image_keys"] == [32, 32, 8, 8, 8, 8]
    with patch(host.model, routing=Routing(variant="kv", split=2)):
        result = measure_saturation(host.model, [inputs], progress=False)
    assert result.curves.image_keys == [32] * LAYERS and result.curves.image_states == [32, 32, 0, 0, 0, 32]
    assert all(mass > 0 for mass in result.curves.mass) and math.isnan(result.curves.image_cosine[3])
    assert result.split == 2 and "routed (kv, split 2)" in result.recommendation.reason


def test_a_patch_that_leaves_the_decoder_alone_is_stock(pair: tuple[Host, Host]) -> None:
    host = pair[1]
    with patch(host.model, fusion=SkipLinks(stride=2)):
        assert patch_on(find(host.model)) is None
    with patch(host.model, routing=Routing(split=LAYERS)):
        assert patch_on(find(host.model)) is None


@pytest.mark.parametrize("chunk", [2, 128])
def test_mass_over_all_keys_is_one_in_every_layer(pair: tuple[Host, Host], chunk: int, monkeypatch: Any) -> None:
    from llava_patch.measurements import passes, trace

    host, count = pair[1], 0
    real = trace.mass_on_keys

    def all_keys(q: Tensor, k: Tensor, queries: Tensor, keys: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal count
        count += 1
        whole = real(q, k, queries, torch.ones_like(keys), *args, **kwargs)
        torch.testing.assert_close(whole, torch.ones_like(whole), atol=1e-6, rtol=0)
        return real(q, k, queries, keys, *args, **kwargs)

    monkeypatch.setattr(trace, "mass_on_keys", all_keys)
    inputs = host.batch([TWO_IMAGES]).inputs
    with patch(host.model, routing=Routing(variant="kv", split=2)):
        with torch.no_grad(), traced(find(host.model), inputs, chunk):
            passes.run(find(host.model), inputs)
    assert count == LAYERS


def mistral(attention: str) -> nn.Module:
    """Hugging Face's host with a sliding window and grouped-query attention."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig

    torch.manual_seed(0)
    text = MistralConfig(**{**models.TEXT, "num_key_value_heads": 2, "sliding_window": 12})
    config = LlavaConfig(
        vision_config=models.vision_config(), text_config=text, image_token_index=models.HF_IMAGE_TOKEN,
        image_seq_length=models.TOKENS,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    set_attention(model, attention)
    return model


@pytest.fixture(scope="module")
def windowed() -> Iterator[tuple[Host, Host]]:
    needs_hf()
    yield Host("hf", mistral("eager")), Host("hf", mistral("sdpa"))


@pytest.mark.parametrize("case", ["stock", "lf", "lf-k2", "pc", "kv", "fastv", "kv+fastv-deep"])
def test_sliding_windows_and_shared_keys_count_places_of_the_whole_sequence(
    windowed: tuple[Host, Host], case: str
) -> None:
    test_every_patch_is_measured_as_its_layers_compute(windowed, case)
