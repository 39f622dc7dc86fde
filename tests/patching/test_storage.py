"""Every method on models as people load them: offloaded by a device_map, quantised by bitsandbytes, in float16."""

import pytest
import torch

from llava_patch import DeepStack, DenseConnector, Routing, SkipLinks, load, patch
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.hosts import storage
from tests.support import stored
from tests.support.models import IMAGE, LAYERS, silence_side_branch
from tests.support.routings import ALL

SAMPLES = [(2, IMAGE, 5), (7,), (1, IMAGE, 9)]
METHODS = {name: ALL[name] for name in ("lf", "pc", "kv", "ideal", "vtw", "lf+fastv")} | {
    "fastv": ALL["fastv"],
    "skip": {"fusion": SkipLinks(stride=2)},
    "dense": {"fusion": DenseConnector()},
    "stack": {"fusion": DeepStack(taps=(2, 4), start=0)},
    "shared": {"fusion": DeepStack(taps=(2, 4), start=0, projector="shared")},
    "skip+lf": {"fusion": SkipLinks(stride=2), "routing": Routing(split=2, freeze="none")},
}
FUSIONS = ("skip", "dense", "stack")


def generate(host, batch):
    inputs = dict(batch.inputs)
    prompt = inputs.pop("input_ids")
    return host.model.generate(
        prompt, **inputs, max_new_tokens=2, do_sample=False, output_scores=True, return_dict_in_generate=True
    ).scores


# --- offloaded --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("disk", [False, True], ids=["cpu", "disk"])
@pytest.mark.parametrize("name", METHODS)
def test_offloaded_weights_give_what_weights_in_memory_give(host, tmp_path, name, disk):
    batch = host.batch(SAMPLES, "left")
    stock = host.logits(batch)
    with patch(host.model, **METHODS[name]):
        expected, tokens = host.logits(batch), generate(host, batch)
    stored.offload(host, tmp_path if disk else None)
    handle = patch(host.model, **METHODS[name])
    assert torch.equal(host.logits(batch), expected)
    assert all(map(torch.equal, generate(host, batch), tokens))
    assert "parameters train" in handle.report()
    handle.remove()
    assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lf", "kv", "skip+lf", "stack"])
def test_a_patched_model_is_offloaded(host, name):
    """Hooks that come after the patch, and go before it: the patch is inside them."""
    from accelerate.hooks import AlignDevicesHook, remove_hook_from_submodules

    if AlignDevicesHook().detach_hook(torch.nn.Linear(1, 1)) is None:
        pytest.skip("accelerate itself does not take two hooks off a module (0.21)")
    batch = host.batch(SAMPLES, "left")
    stock = host.logits(batch)
    handle = patch(host.model, **METHODS[name])
    expected = host.logits(batch)
    stored.offload(host)
    assert torch.equal(host.logits(batch), expected)
    handle.report()
    handle.remove()
    if name in ("lf", "kv"):  # a fused projector goes back to its stock layer, which no hook has touched
        assert torch.equal(host.logits(batch), stock)
    handle = patch(host.model, **METHODS["lf"])
    expected = host.logits(batch)
    remove_hook_from_submodules(host.model)
    assert torch.equal(host.logits(batch), expected)
    handle.remove()
    assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
def test_an_adapter_of_an_offloaded_model(host, tmp_path):
    """The copies are in memory; what an adapter brings reaches weights that are not."""
    batch = host.batch(SAMPLES, "left")
    host.model.config._name_or_path = "base"
    stored.offload(host, tmp_path / "disk")
    handle = patch(host.model, **METHODS["skip+lf"])
    for parameter in handle.added_parameters():
        if not parameter.is_meta:
            parameter.add_(0.01)
    expected = host.logits(batch)
    twin = next(iter(host.decoder.side_branch))
    assert not any(p.is_meta for p in twin.parameters())
    handle.save(tmp_path / "adapter")
    handle.remove()
    for bias in [n for n, _ in host.model.named_parameters() if "projector" in n and n.endswith("bias")]:
        storage.put(host.model, bias, torch.zeros_like(storage.value(host.model, bias)))
    assert not torch.equal(host.logits(batch), expected)
    load(host.model, tmp_path / "adapter")
    assert torch.equal(host.logits(batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("method", ["lf", "stack", "skip+lf"])
def test_a_full_checkpoint_opens_with_its_bases_device_map(files, name, method, place, tmp_path):
    """The map does not know what the patch adds; it is the user's, and stays as it is."""
    host = stored.read(name, files[name])
    batch = stored.batch(host, SAMPLES)
    places = stored.device_map(host, place)
    given = dict(places)
    handle = patch(host.model, **METHODS[method])
    for parameter in handle.added_parameters():
        parameter.add_(0.01)
    handle.save(tmp_path / "full", form="full")
    again = stored.read(name, tmp_path / "full", device_map=places, offload_folder=str(tmp_path / "disk"))
    assert torch.equal(again.logits(batch), host.logits(batch)) and places == given
    if method != "stack":
        assert all(p.is_meta == (place == "disk") for p in again.decoder.side_branch.parameters())


@torch.no_grad()
@pytest.mark.parametrize("way", ["map", "cpu", "disk"])
def test_an_offloaded_model_is_saved_whole(files, name, way, tmp_path):
    """Offloaded by a device_map, which `save_pretrained` may know, or by accelerate's functions, which it does not."""
    host = stored.read(name, files[name])
    batch = stored.batch(host, SAMPLES)
    if way != "map":
        stored.offload(host, tmp_path / "disk" if way == "disk" else None)
    else:
        places = stored.device_map(host, "disk")
        host = stored.read(name, files[name], device_map=places, offload_folder=str(tmp_path / "disk"))
    handle = patch(host.model, **METHODS["skip+lf"])
    assert any(p.is_meta for p in host.model.parameters())
    handle.save(tmp_path / "full", form="full")
    assert torch.equal(stored.read(name, tmp_path / "full").logits(batch), host.logits(batch))


# --- quantised, and float16 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    return {name: stored.write(name, folder) for name in ("hf", "llava")}


@pytest.fixture(params=["hf", "llava"])
def name(request):
    return request.param


@pytest.fixture(params=["float16", "8bit", "4bit"])
def quantise(request, monkeypatch):
    """bitsandbytes' fast 4-bit kernel for some CPUs rounds the scales anew, and again when it is saved."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    return {"float16": None, "8bit": stored.EIGHT, "4bit": stored.FOUR}[request.param]


@torch.no_grad()
@pytest.mark.parametrize("methods", [("lf", "kv", "skip+lf"), ("pc", "ideal", "fastv"), ("vtw", "lf+fastv"), FUSIONS])
def test_every_method_on_a_loaded_model_is_saved_and_comes_back(files, name, quantise, methods, tmp_path):
    host = stored.read(name, files[name], quantise)
    batch = stored.batch(host, SAMPLES)
    stock = host.logits(batch)
    for method in methods:
        handle = patch(host.model, **METHODS[method])
        logits = host.logits(batch)
        assert logits.dtype == torch.float16 and logits[batch.valid].isfinite().all()
        assert torch.equal(logits, stock) == (method in FUSIONS and quantise is not stored.EIGHT)
        assert all(step.isfinite().all() for step in generate(host, batch))
        handle.save(tmp_path / f"{method}-adapter")
        handle.save(tmp_path / f"{method}-full", form="full")
        handle.remove()
        assert torch.equal(host.logits(batch), stock)
        load(host.model, tmp_path / f"{method}-adapter")
        assert torch.equal(host.logits(batch), logits), method
        host.model._llava_patch_handle.remove()
        if method in ("lf", "vtw", "skip"):  # one of each kind of tensors
            for form in ("adapter", "full"):
                again = stored.read(name, tmp_path / f"{method}-{form}", quantise if form == "adapter" else None)
                assert torch.equal(again.logits(batch), logits), (method, form)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lf", "skip"])
def test_a_fast_cpu_kernels_layout_stays(method, files, name):
    """It cannot be read without rounding the scales, and the layers that are read are the stock model's."""
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    if not modules.has_avx512bf16():
        pytest.skip("bitsandbytes has no fast 4-bit kernel for this CPU")
    host = stored.read(name, files[name], stored.FOUR)
    batch = stored.batch(host, SAMPLES)
    stock = host.logits(batch)  # changes the layout
    handle = patch(host.model, **METHODS[method])
    patched = host.logits(batch)
    if method == "skip":  # computes its projector in another precision than the kernel
        assert (patched - stock)[batch.valid].abs().max() <= 0.1 * stock.abs().max()
    handle.remove()
    assert torch.equal(host.logits(batch), stock)


@torch.no_grad()
def test_silent_side_branches_are_the_stock_quantised_model(files, name, quantise):
    host = stored.read(name, files[name], quantise)
    batch = stored.batch(host, SAMPLES)
    stock = host.logits(batch)
    for routing in (Routing(split=LAYERS - 1), Routing(variant="kv", split=LAYERS - 1)):
        with patch(host.model, routing=routing):
            silence_side_branch(host.decoder)
            difference = (host.logits(batch) - stock)[batch.valid].abs().max()
            assert difference <= 4e-3 * stock.abs().max(), routing  # a step of float16


@torch.no_grad()
def test_what_is_added_or_widened_is_not_quantised(files, name, tmp_path, monkeypatch):
    """The user names no module: neither for a checkpoint in 16 bit, nor for a plain one and a configured fusion."""
    host = stored.read(name, files[name])
    host.model.requires_grad_(False)
    handle = patch(host.model, **METHODS["skip+lf"])
    for parameter in handle.added_parameters():
        parameter.add_(0.01)
    kept = {n: p.clone() for n, p in host.model.named_parameters() if "side_branch" in n or "projector" in n}
    handle.save(tmp_path / "full", form="full")
    handle.save(tmp_path / "adapter")
    for form in ("full", "adapter"):
        for quantise in (stored.EIGHT, stored.FOUR):
            host = stored.read(name, tmp_path / form, quantise)
            found = dict(host.model.named_parameters())
            assert all(torch.equal(found[n], kept[n]) for n in kept), form
            assert stored.classes(host.decoder.layers) & {"Linear8bitLt", "Linear4bit"}
            assert type(host.model.lm_head).__name__ == "Linear"
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "Patch.fusion = @SkipLinks()")
    host = stored.read(name, files[name], stored.EIGHT)
    assert host.model._llava_patch_handle.fusion == SkipLinks()
    projector = host.model._llava_patch_handle.anatomy.projector
    assert stored.classes(projector) == {"FusedLinear", "Linear"}


def test_a_side_branch_of_quantised_layers_has_their_values_and_trains(files, name):
    for quantise in (stored.EIGHT, stored.FOUR):
        host = stored.read(name, files[name], quantise)
        batch = stored.batch(host, SAMPLES)
        host.logits(batch)  # moves 8-bit scales to another place
        handle = patch(host.model, routing=Routing(split=3))
        twin, layer = host.decoder.side_branch[0], host.decoder.layers[3]
        linear = layer.mlp.up_proj
        eye = torch.eye(64, dtype=torch.float16)
        assert torch.allclose(twin.mlp.up_proj(eye), linear(eye), rtol=0.02, atol=2e-3)
        assert stored.classes(twin) == {"Linear"} and stored.classes(layer) != {"Linear"}
        host.model.train()
        host.logits(batch).float().square().mean().backward()
        names = [n for n, p in host.model.named_parameters() if p.grad is not None]
        assert names == handle.trainable() and all("side_branch" in n for n in names)


def test_an_adapter_does_not_lose_what_lora_has_changed_in_quantised_weights(files, name, tmp_path):
    peft = pytest.importorskip("peft")
    for quantise in (stored.EIGHT, stored.FOUR):
        host = stored.read(name, files[name], quantise)
        batch = stored.batch(host, SAMPLES)
        handle = patch(host.model, routing=Routing(split=3, freeze="none"))
        model = peft.get_peft_model(host.model, peft.LoraConfig(r=4, target_modules=r".*model\.layers\.5\..*q_proj"))
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            torch.nn.init.normal_(parameter, std=0.05)
        model.merge_and_unload()
        with pytest.raises(CheckpointError, match=r'merged into .*layers\.5\.self_attn\.q_proj .* form="full"'):
            handle.save(tmp_path / "adapter")
        handle.save(tmp_path / "full", form="full")
        with torch.no_grad():
            assert torch.equal(stored.read(name, tmp_path / "full").logits(batch), host.logits(batch))


def test_quantised_weights_do_not_train(files, name):
    host = stored.read(name, files[name], stored.EIGHT)
    with pytest.raises(SettingError, match="would train layer 5, whose weights are quantised"):
        patch(host.model, routing=Routing(split=3, freeze="side_and_fusion"))
    if name == "hf":  # llava's tower is loaded apart, in floating point
        with pytest.raises(SettingError, match="but the vision tower's weights are quantised"):
            patch(host.model, fusion=SkipLinks(stride=2, train_tower="all"))


@torch.no_grad()
@pytest.mark.parametrize("bits", ["load_8bit", "load_4bit"])
def test_llavas_own_loader_quantises(files, tmp_path, bits, monkeypatch):
    """It says twice how to quantise, of which transformers takes one."""
    from llava.model.builder import load_pretrained_model

    from tests.support.fileset import tokenizer

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)

    def read(path):
        tokenizer().save_pretrained(path)
        model = load_pretrained_model(
            str(path), None, "llava-tiny", **{bits: True}, device_map="cpu", device="cpu"
        )[1]  # fmt: skip
        model.get_vision_tower().to(dtype=torch.float16)
        return stored.Host("llava", model.eval())

    host = read(files["llava"])
    assert stored.classes(host.decoder.layers) == {"Linear8bitLt" if bits == "load_8bit" else "Linear4bit"}
    batch = stored.batch(host, SAMPLES)
    stock = host.logits(batch)
    handle = patch(host.model, **METHODS["skip+lf"])
    expected = host.logits(batch)
    handle.save(tmp_path / "adapter")
    handle.save(tmp_path / "full", form="full")
    assert torch.equal(read(tmp_path / "adapter").logits(batch), expected)
    assert torch.equal(read(tmp_path / "full").logits(batch), expected)
    handle.remove()
    assert torch.equal(host.logits(batch), stock)
