"""Whatever the batch and the settings: the variant's definition holds, cached and not, and nothing piles up."""

import contextlib
import dataclasses
import gc
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_patch import FastV, Routing, patch
from tests.support.models import IMAGE, LAYERS, close
from tests.support.routings import ALL, embeddings, extend, places

from .naive import naive


@st.composite
def samples(draw):
    """A ragged batch: text of 0 to 5 tokens around 0 to 2 images."""
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        parts = [draw(st.integers(0, 5))]
        for _ in range(draw(st.integers(0, 2))):
            parts += [IMAGE, draw(st.integers(0, 5))]
        parts = [p for p in parts if p]
        # llava takes one token for a decoding step, and HF no sample without any
        batch.append(tuple(parts if len(parts) > 1 else [*parts, 2]))
    return batch


@st.composite
def methods(draw):
    """Settings that fit a model of LAYERS layers."""
    variant = draw(st.sampled_from(["lf", "lf", "pc", "kv", "ideal", "vtw", None]))
    chosen = {}
    split = draw(st.integers(0, LAYERS - 1))
    if variant is not None:
        side = draw(st.integers(1, min(3, LAYERS - split))) if variant != "vtw" else 1
        fusion = 1
        if variant == "lf":
            named = st.lists(st.integers(split, LAYERS - 1), min_size=1, unique=True).map(tuple)
            fusion = draw(st.one_of(st.integers(1, LAYERS - split), named))
        chosen["routing"] = Routing(variant=variant, split=split, fusion_layers=fusion, side_layers=side)
    last = split if variant in ("lf", "ideal", "vtw") else LAYERS - 1
    if last >= 1 and (variant is None or draw(st.booleans())):
        ratio = draw(st.sampled_from([0.1, 0.5, 0.75, 1.0]))
        chosen["pruning"] = FastV(layer=draw(st.integers(1, last)), ratio=ratio)
    return chosen or {"routing": Routing(split=2)}


@settings(max_examples=120, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples(), methods(), st.sampled_from(["left", "right"]), st.integers(0, 100))
@torch.no_grad()
def test_any_batch_under_any_settings(host, samples, chosen, padding, seed):
    batch = host.batch(samples, padding, seed=seed)
    embeds = embeddings(host, batch)
    extra = {"position_ids": places(batch.valid)} if host.name == "hf" else {}
    with patch(host.model, **chosen) as handle:
        out = host.model(**batch.inputs, use_cache=True, **extra)
        # The choice is compared by its scores, not by itself: near ties may fall either way in another batch shape.
        kept = out.past_key_values.kept() if hasattr(out.past_key_values, "kept") else batch.valid
        for i in range(len(samples)):
            keep = batch.valid[i]
            choice = kept[i][keep] if "pruning" in chosen else None
            states = naive(host.decoder, embeds[i][keep], batch.image[i][keep], **chosen, choice=choice)
            assert close(out.logits[i][keep], host.model.lm_head(states))
        if padding == "left":
            _decode(host, handle, batch, out, chosen)


def _decode(host, handle, batch, out, chosen):
    token = torch.full((len(batch.valid), 1), 7)
    mask = torch.cat([batch.valid.long(), torch.ones_like(token)], 1)
    last = {"position_ids": places(mask)[:, -1:]} if host.name == "hf" else {}
    every = {"position_ids": places(mask)} if host.name == "hf" else {}
    step = host.model(
        input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True, **last
    ).logits
    pruned = "pruning" in chosen and hasattr(out.past_key_values, "kept")
    with handle.image_positions(kept=out.past_key_values.kept()) if pruned else contextlib.nullcontext():
        whole = host.model(**extend(batch, token), use_cache=False, **every).logits
    assert close(step[:, -1], whole[:, -1])


@pytest.mark.parametrize(("host", "case"), [("hf", "lf"), ("llava", "kv+fastv")], indirect=["host"])
def test_a_thousand_random_batches_leave_nothing_behind(host, case):
    """Live tensors are as many as after the first fifty batches; the process grows by less than 32 MiB."""
    chosen = dict(ALL[case])
    if "pruning" in chosen:
        chosen["pruning"] = dataclasses.replace(chosen["pruning"], training=True)
    generator = random.Random(0)
    counts, sizes = [], []
    with patch(host.model, **chosen):
        for number in range(1001):
            samples = [
                (generator.randint(1, 4), *([IMAGE] * generator.randint(0, 2)), generator.randint(1, 6))
                for _ in range(generator.randint(1, 3))
            ]
            batch = host.batch(samples, generator.choice(["left", "right"]), seed=number, labels=True)
            if number % 5 == 0:
                host.model.train()
                host.model(**batch.inputs, use_cache=False).loss.backward()
                host.model.zero_grad()
                host.model.eval()
            else:
                with torch.no_grad():
                    host.model(**batch.inputs, use_cache=number % 2 == 0)
            if number in (50, 1000):
                del batch
                gc.collect()
                counts.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
                sizes.append(_resident())
    assert counts[1] == counts[0]
    assert sizes[1] - sizes[0] < 32 * 2**20


def _resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
