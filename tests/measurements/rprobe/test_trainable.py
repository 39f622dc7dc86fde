import sys

import pytest
import torch

from llava_patch.core.errors import SettingError
from llava_patch.hosts.anatomy import find
from llava_patch.measurements.rprobe import train as trainable
from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.train import (
    check_memory,
    choose_trained,
    free_memory,
    needed_memory,
    train_probe,
    trained_parameters,
)
from llava_patch.probe.decoder import ProbeDecoder
from tests.support.probes import Characters, made_up, processor, tiny_model


@pytest.mark.parametrize("trained", ["all", "lora", "head"])
def test_what_is_trained_changes_and_nothing_else(trained):
    settings = RProbe(steps=3, batch_size=8, trained=trained, lora_rank=4)
    data = made_up(8, 1, "true")
    decoder = ProbeDecoder(find(tiny_model()), data.grid)
    batch = data.batch(torch.arange(8))
    plain = decoder(batch.image_tokens, batch.text_tokens, batch.sequence)
    choose_trained(decoder, settings)
    assert torch.equal(decoder(batch.image_tokens, batch.text_tokens, batch.sequence), plain)  # updates start at zero
    before = {name: p.clone() for name, p in decoder.named_parameters()}
    train_probe(decoder, data, settings, 1e-2)
    changed = {name for name, p in decoder.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained_parameters(decoder))
    layers = {name for name in changed if not name.startswith("head.")}
    assert {name for name in changed if name.startswith("head.")} == {n for n in before if n.startswith("head.")}
    if trained == "head":
        assert not layers and all(p.grad is None for p in decoder.layers.parameters())
    elif trained == "lora":
        assert len(layers) == 2 * 7 and all("lora_" in name for name in layers)
        assert all(p.shape[0] == 4 for name, p in decoder.named_parameters() if "lora_A" in name)
    else:
        assert changed == set(before)


def test_lora_is_the_same_whatever_the_callers_random_state_and_dtype():
    def updates():
        decoder = ProbeDecoder(find(model), grid)
        choose_trained(decoder, RProbe(trained="lora"))
        return [p for name, p in decoder.named_parameters() if "lora_A" in name]

    model, grid = tiny_model(), made_up(1, 1, "true").grid
    first = updates()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, updates(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    settings = RProbe(steps=3, batch_size=4, train_pages=6, heldout_pages=3, trained="lora", threshold=1e-6)
    expected = run_rprobe(model, processor(), Characters(), settings, progress=False)
    torch.set_default_dtype(torch.float16)  # what loading a checkpoint may leave behind
    try:
        assert run_rprobe(model, processor(), Characters(), settings, progress=False).losses == expected.losses
    finally:
        torch.set_default_dtype(torch.float32)
    assert expected.facts["comparable"] is False
    assert "not comparable: only lora was trained" in expected.summary()
    assert expected.facts["trained_parameters"] < expected.facts["probe_parameters"]


def test_lora_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    decoder = ProbeDecoder(find(tiny_model()), made_up(1, 1, "true").grid)
    with pytest.raises(SettingError, match=r'RProbe.trained = "lora" needs peft: pip install peft'):
        choose_trained(decoder, RProbe(trained="lora"))


def test_memory_is_counted_as_it_is_and_checked_before_the_long_part(monkeypatch):
    model = tiny_model()
    for trained in ("all", "lora", "head"):
        settings = RProbe(trained=trained)
        decoder = ProbeDecoder(find(model), made_up(1, 1, "true").grid)
        # The made-up grid has smaller patches than the model's: their rows of the head are not counted.
        last = decoder.head[-1]
        more = (3 * 14**2 - last.out_features) * last.in_features
        choose_trained(decoder, settings)
        everything = sum(p.numel() for p in decoder.parameters()) + more
        changing = sum(p.numel() for p in trained_parameters(decoder).values()) + more
        assert needed_memory(find(model), settings) == pytest.approx(4 * (everything + 3 * changing), rel=0.02)
    assert free_memory(torch.device("cpu")) is None or free_memory(torch.device("cpu")) > 10**8
    check_memory(find(model), RProbe())
    monkeypatch.setattr(trainable, "free_memory", lambda device: 10_000)
    with pytest.raises(SettingError, match=r'cpu has 0.0 GB free: set RProbe.trained = "lora"'):
        run_rprobe(model, processor(), Characters(), RProbe(), progress=False)
    with pytest.raises(SettingError, match=r'RProbe.trained = "head".*: use a device with more free memory'):
        check_memory(find(model), RProbe(trained="head"))
