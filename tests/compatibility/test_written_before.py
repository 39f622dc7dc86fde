"""What version 0.1.0 wrote goes on loading, with the same numbers.

The files under `written/` were written by version 0.1.0 at commit df1383a, and `expected.json` holds what that code
read and computed from them. They must go on loading: people have such files. Never regenerate them, since files of
today's code prove nothing about yesterday's; where a format changes, add files of the new one beside them.

How they were made, with torch 2.13.0 on CPU and transformers 4.57.1, from models of random weights (4 tower blocks of
width 8, 16 image tokens, 4 decoder layers of width 16, a vocabulary of 55), with this as the current folder:

- `base`: Hugging Face's LLaVA, tokenizer and processor, saved in half precision by transformers alone.
- `adapters/*`: a fusion on `base` whose projector was moved a little, then routing or pruning on it, its side branch
  moved as well, then `handle.save`.
- `llava`, over the tower in `llava_tower`: the original host, fused, with a trained tower and routing at two fusion
  layers, all weights moved; in half precision, `handle.save(form="full")`.
- `run`: five steps of Hugging Face's Trainer with `AuxiliaryProbe` and `Gradients`, the callback of LLaVA's training
  among its own. Files of torch (optimizer, random state) were taken out.
- `rprobe`, `rprobe_ablation`, `saturation`, `gradients`, `reach`, `drift`, `fusion_attention`, `attention_maps`,
  `flops`, `report`: the commands of these names on `base`, `adapters/skip_links_lf` and `data`. `rprobe_unfinished` was
  interrupted at step 7 of 8, `saturation_unfinished` after two samples of three.
- `cache`: what the first `rprobe` and `Routing(split="auto")` kept there.
- `sweep`: the command that the last test repeats, with scripts that stood in for training and evaluation. They are not
  here: a run that is begun again fails.
- `settings.json`: every method's settings as records hold them.

Pictures, logs and locks were left out, and paths below this folder made relative to it.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from typer.testing import CliRunner

import llava_patch
from llava_patch import (
    AuxiliaryProbe,
    DeepStack,
    DenseConnector,
    FastV,
    Routing,
    Saturation,
    SkipLinks,
    get_handle,
    patch,
)
from llava_patch.cli.main import app
from llava_patch.hosts import compat

HERE = Path(__file__).resolve().parent
WRITTEN = HERE / "written"
EXPECTED = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))

BEFORE, IMAGE_ID, AFTER = [5, 9, 14], 54, [7, 21, 33, 40, 11]
ADAPTERS = {
    "adapters/skip_links_lf": {"fusion": SkipLinks(layers=(1, 2), detach=1), "routing": Routing(split=2)},
    "adapters/deep_stack_fastv": {
        "fusion": DeepStack(taps=(1, 2), start=1, interval=1, detach=(0,)), "pruning": FastV(2, 0.5),
    },
    "adapters/sti_kv": {
        "fusion": DenseConnector("sti", groups=(1, 2), detach=(0,)), "routing": Routing("kv", split=2),
    },
    "run/llava_patch_adapter": {"fusion": SkipLinks(layers=(1, 2), detach=0, train_tower="all")},
}  # fmt: skip
CHECKPOINTS = (*ADAPTERS, "run/checkpoint-3", "llava")
PROBE = (
    "base", "data/train.jsonl", "--heldout", "data/heldout.jsonl", "--steps", "8", "--batch-size", "3",
    "--gin-param", "RProbe.save_every = 4", "--gin-param", "RProbe.maps = 0", "--gin-param", "RProbe.resamples = 50",
    "--gin-param", "RProbe.threshold = 0.9",
)  # fmt: skip
# Stores of R-Probe are named after these: another version may round otherwise, and then encodes anew.
LIBRARIES = ("llava_patch", "torch", "torchvision", "transformers", "llava-torch", "llava", "timm", "pillow", "numpy")


@pytest.fixture(autouse=True)
def written(tmp_path, monkeypatch):
    """A copy as the current folder, since reading locks and marks things, and its cache as the user's."""
    folder = tmp_path / "written"
    shutil.copytree(WRITTEN, folder)  # with times of change: they tell whether a file was written again
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLAVA_PATCH_CACHE", str(folder / "cache"))
    return folder


# --- helpers ----------------------------------------------------------------------------------------------------------


def agrees(name: str, found: Any) -> None:
    """Compare plain values with what the old code had."""
    compare(found, EXPECTED[name], name)


def compare(found: Any, expected: Any, where: str) -> None:
    """Numbers within rounding, the rest exactly. A mapping may have gained entries: formats may grow."""
    if isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found!r}"
        for key, value in expected.items():
            assert key in found, f"{where}: {key} is gone"
            compare(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(found, (list, tuple)) and len(found) == len(expected), f"{where}: {found!r}"
        for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
            compare(mine, theirs, f"{where}[{number}]")
    elif isinstance(expected, float) and isinstance(found, (int, float)):
        assert math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-5), f"{where}: {found}, then {expected}"
    else:
        assert type(found) is type(expected) and found == expected, f"{where}: {found!r}, then {expected!r}"


def agrees_in_logits(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Compare a few logits of the last token; sums come in another order on other machines."""
    with torch.no_grad():
        found = model.float().eval()(**inputs).logits[0, -1, :8]
    expected = torch.tensor(EXPECTED["logits"][name])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), f"{name}: {found}, then {expected}"


def content(name: str) -> Any:
    return json.loads(Path(name).read_text(encoding="utf-8"))


def numbers(tensor: Tensor) -> list[float]:
    """Sum and first values."""
    flat = tensor.detach().double().flatten()
    return [float(flat.sum()), *flat[:4].tolist()]


def header(path: str) -> dict[str, Any]:
    """What our states on disk say of themselves."""
    with safe_open(path, framework="pt") as stream:
        return json.loads(stream.metadata()["llava_patch"])


def hf(folder: str = "base") -> nn.Module:
    return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def pixels() -> Tensor:
    return torch.linspace(-2, 2, 3 * 16 * 16).sin().reshape(1, 3, 16, 16)


def hf_inputs(tokens: int = 16) -> dict[str, Tensor]:
    ids = torch.tensor([[*BEFORE, *[IMAGE_ID] * tokens, *AFTER]])
    return {"input_ids": ids, "pixel_values": pixels(), "attention_mask": torch.ones_like(ids)}


def llava_inputs() -> dict[str, Tensor]:
    ids = torch.tensor([[*BEFORE, -200, *AFTER]])
    return {"input_ids": ids, "images": pixels(), "attention_mask": torch.ones_like(ids)}


def call(*words: str) -> Any:
    done = CliRunner().invoke(app, list(words), env={"COLUMNS": "160"})
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def times(*patterns: str) -> dict[str, int]:
    """When files were last changed."""
    return {str(path): path.stat().st_mtime_ns for pattern in patterns for path in Path().glob(pattern)}


def same_methods(handle: Any, methods: dict[str, Any]) -> None:
    assert (handle.fusion, handle.routing, handle.pruning) == tuple(
        methods.get(name) for name in ("fusion", "routing", "pruning")
    )


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_files_are_those_that_were_written():
    """Git must not change an end of a line, and nobody a fixture."""
    there = {p.relative_to(WRITTEN).as_posix(): p for p in WRITTEN.rglob("*") if p.is_file()}
    assert sorted(there) == sorted(EXPECTED["files"])
    for name, path in there.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == EXPECTED["files"][name], name


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_opens_with_the_hosts_own_loader(name):
    model = hf(name)
    handle = get_handle(model)
    same_methods(handle, ADAPTERS[name])
    agrees(f"settings of {name}", handle.settings())
    agrees_in_logits(name, model, hf_inputs(handle.tokens_per_image))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_goes_onto_its_base_in_memory(name):
    model = hf()
    handle = llava_patch.load(model, name)
    same_methods(handle, ADAPTERS[name])
    agrees_in_logits(name, model, hf_inputs(handle.tokens_per_image))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_is_saved_again_is_the_same(name):
    model = hf(name).requires_grad_(False)  # an adapter holds what trains as well, and not every patch freezes the rest
    get_handle(model).save("again")
    before, after = (load_file(Path(folder) / "llava_patch.safetensors") for folder in (name, "again"))
    agrees(f"tensors of {name}", sorted(compat.as_here(after, before)))
    before = compat.as_here(before, after)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    record = content(f"{name}/llava_patch.json")
    assert record.pop("base") == "base" and Path(content("again/llava_patch.json")["base"]) == Path("base").resolve()
    record.pop("probe", None)  # of the training, which is over
    record["fingerprint"] = compat.as_here(record["fingerprint"], dict(model.named_parameters()))
    compare(content("again/llava_patch.json"), record, name)


def test_the_processor_beside_an_adapter_writes_as_many_placeholders_as_it_has_tokens():
    processor = LlavaProcessor.from_pretrained("adapters/sti_kv")
    ids = processor(images=Image.open("data/0.png"), text="<image> one", return_tensors="pt")["input_ids"]
    assert int((ids == IMAGE_ID).sum()) == get_handle(hf("adapters/sti_kv")).tokens_per_image == 20


def test_a_full_checkpoint_of_hugging_faces_host_opens_with_its_own_loader():
    model = hf("run/checkpoint-3")
    handle = get_handle(model)
    same_methods(handle, ADAPTERS["run/llava_patch_adapter"])
    assert handle.trained_tower
    agrees("settings of run/checkpoint-3", handle.settings())
    agrees("added to run/checkpoint-3", sorted(n for n in model.state_dict() if "projector" in n))
    agrees_in_logits("run/checkpoint-3", model, hf_inputs())


def test_a_full_checkpoint_of_the_original_host_opens_with_its_own_loader():
    pytest.importorskip("llava")
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    model = LlavaLlamaForCausalLM.from_pretrained("llava", dtype=torch.float32)
    model.get_vision_tower().load_model()
    handle = get_handle(model)
    fusion = SkipLinks(layers=(1, 2), train_tower="all")
    same_methods(handle, {"fusion": fusion, "routing": Routing(split=2, fusion_layers=(2, 3), freeze="none")})
    assert handle.trained_tower
    agrees("settings of llava", handle.settings())
    added = sorted(n for n in model.state_dict() if "projector" in n or "side_branch" in n)
    agrees("added to llava", added)
    agrees_in_logits("llava", model, llava_inputs())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inspect_says_what_a_checkpoint_is(name):
    if name == "llava":
        pytest.importorskip("llava")
    found = json.loads(call("inspect", name, "--json").stdout)
    kept = ("patched", "host", "form", "settings", "trained_tower", "parameters", "base")
    brief = {key: found[key] for key in kept}
    brief["added"] = dict.fromkeys(one["role"] for one in found["added"])
    for role in brief["added"]:
        brief["added"][role] = sum(one["parameters"] for one in found["added"] if one["role"] == role)
    brief["trainable"] = found["share"]["trainable"]
    brief["same base"] = found["match"] and found["match"]["same"]
    agrees(f"inspection of {name}", brief)


def test_the_head_of_an_auxiliary_loss_comes_back_beside_its_checkpoint():
    from llava_patch.integrations.training.auxiliary import trainer

    model = hf("run/checkpoint-3")
    settings = AuxiliaryProbe(weight=0.5, max_text_tokens=8)
    handle = patch(model, probe=settings)
    trainer.load_head(handle, Path("run/checkpoint-3"))  # compares the model beside it as well
    agrees("head", {name: numbers(p) for name, p in handle.auxiliary.head.named_parameters()})
    agrees("settings with a probe", handle.settings())
    compare(handle.settings(), {k: v for k, v in content("run/llava_patch.json").items() if k != "form"}, "run")


def test_settings_of_every_method_come_back_from_records():
    from llava_patch.core.registry import METHODS
    from llava_patch.settings.methods import from_dict, to_dict

    records = content("settings.json")
    assert {record["method"] for record in records} <= set(METHODS)
    assert [repr(from_dict(record, "settings.json")) for record in records] == EXPECTED["methods"]
    for record in records:
        again = to_dict(from_dict(record, "settings.json"))  # what has come since is there with its default, as above
        compare({name: again[name] for name in record}, record, record["method"])


# --- R-Probe ----------------------------------------------------------------------------------------------------------


def probe_numbers(result: Any) -> dict[str, Any]:
    names = (
        "mse", "fvu", "psnr", "constant_mse", "target_variance", "mse_interval", "fvu_interval", "steps_to_threshold",
        "threshold", "threshold_is_vacuous", "steps_to_half_fvu", "losses", "running", "settings",
    )  # fmt: skip
    found = {name: getattr(result, name) for name in names}
    found |= {"inside": vars(result.inside), "outside": vars(result.outside), "documents": result.documents}
    facts = ("host", "decoder_layers", "learning_rate", "train_samples", "heldout_samples")
    places = {name: Path(result.facts[name]).name for name in ("checkpoint", "source", "heldout_source")}
    return {**found, "facts": {name: result.facts[name] for name in facts} | places}


def test_an_rprobe_result_is_read():
    from llava_patch.measurements.rprobe.result import RProbeResult

    result = RProbeResult.load("rprobe/rprobe.json")
    agrees("rprobe", probe_numbers(result))
    compare(result.to_dict(), content("rprobe/rprobe.json"), "rprobe")
    assert "held-out MSE" in result.summary()


def test_an_ablation_of_rprobe_and_its_runs_are_read():
    from llava_patch.measurements.rprobe.ablation import notes, tables
    from llava_patch.measurements.rprobe.compare import load

    values = content("rprobe_ablation/ablation.json")
    assert [len(rows) for _, rows in tables(values)] == [4, 4] and notes(values)
    runs = load([Path("rprobe_ablation")])
    agrees("ablation", {name: [run.mse, run.settings["masked"], run.settings["text"]] for name, run in runs.items()})
    assert {name: run["mse"] for name, run in values["runs"].items()} == {name: run.mse for name, run in runs.items()}


def test_stores_of_frozen_tokens_are_listed_and_opened():
    from llava_patch.measurements.rprobe.store.disk import Store, list_stores, stores_folder

    found = {}
    for kept in list_stores(stores_folder()):
        store = Store(kept.folder.name, kept.about["shards"], kept.about, 20.0)
        shard = store.open(0)  # None where it is not understood
        assert shard is not None, kept.folder.name
        record, grid = shard.records[-1], shard.grid(0)
        found[kept.folder.name] = {
            "about": kept.about, "samples": len(shard.records), "skipped": shard.skipped,
            "record": [record.index, record.id, record.document, record.text],
            "grid": [grid.rows, grid.columns, grid.cell], "text_start": shard.text_start(0),
            **{name: shard.rows(name, 0).tolist() for name in ("target", "boxes")},
            **{name: numbers(shard.rows(name, 0)) for name in ("tokens", "pixels", "positions")},
        }  # fmt: skip
        store.close()
    agrees("stores", found)


def test_a_trained_probe_fills_a_fresh_one_of_the_same_model():
    from llava_patch.hosts.anatomy import find
    from llava_patch.measurements.rprobe.keys import difference, make_key
    from llava_patch.measurements.rprobe.resume import load_decoder
    from llava_patch.measurements.rprobe.settings import RProbe
    from llava_patch.measurements.rprobe.train import choose_trained
    from llava_patch.probe.decoder import ProbeDecoder, trained_parameters
    from llava_patch.probe.sequence import TokenGrid

    anatomy = find(hf())
    settings = RProbe(steps=8, batch_size=3, save_every=4, maps=0, resamples=50, threshold=0.9)
    decoder = ProbeDecoder(anatomy, TokenGrid(4, 4, 4), settings.rope, settings.seed)
    choose_trained(decoder, settings)
    saved = header("rprobe/decoder.safetensors")["key"]
    key = make_key(decoder, "", torch.zeros(0), settings, settings.learning_rate(16))
    # The data's key holds the libraries' versions and the machine's rounding: see the next tests.
    if version("transformers") != EXPECTED["arithmetic"]["versions"]["transformers"]:
        pytest.skip("another transformers than the probe was trained with, whose configurations have other entries")
    own = [name for name in saved if name not in ("data", "embeddings") and not name.startswith("version of")]
    assert set(saved) <= set(key)
    assert difference({name: saved[name] for name in own}, {name: key[name] for name in own}) == ""
    load_decoder(decoder, "rprobe/decoder.safetensors", {name: key[name] for name in own})
    agrees("decoder", {name: numbers(p) for name, p in trained_parameters(decoder).items()})


@pytest.fixture
def same_rounding():
    """Skip where stores are encoded anew by right: with other libraries, or on a processor that rounds otherwise."""
    if arithmetic() != EXPECTED["arithmetic"]:
        pytest.skip("other library versions or another processor's rounding than these files were written with")


def arithmetic() -> dict[str, Any]:
    def one(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    with torch.no_grad():
        bits = hf().model.vision_tower(pixels()).last_hidden_state.numpy().tobytes()
    return {"versions": {name: one(name) for name in LIBRARIES}, "tower": hashlib.sha256(bits).hexdigest()}


def test_the_same_command_takes_a_finished_probe_and_its_stores_as_they_are(same_rounding):
    from llava_patch.measurements.rprobe.result import RProbeResult

    kept = ("cache/rprobe/*/shard-*.safetensors", "cache/rprobe/*/manifest.json", "rprobe/decoder.safetensors")
    before = times(*kept)
    call("rprobe", *PROBE, "--keep-decoder", "--output", "rprobe")
    assert times(*kept) == before
    agrees("rprobe", probe_numbers(RProbeResult.load("rprobe/rprobe.json")))


def test_the_same_command_goes_on_with_an_unfinished_probe(same_rounding):
    from llava_patch.measurements.rprobe.result import RProbeResult

    said = call("rprobe", *PROBE, "--keep-decoder", "--output", "rprobe_unfinished").output
    assert "goes on after step 4 of 8" in said
    agrees("rprobe", probe_numbers(RProbeResult.load("rprobe_unfinished/rprobe.json")))
    assert not Path("rprobe_unfinished/training.safetensors").exists()
    made, whole = (load_file(f"{name}/decoder.safetensors") for name in ("rprobe_unfinished", "rprobe"))
    assert all(torch.equal(made[name], tensor) for name, tensor in whole.items())


# --- measurements -----------------------------------------------------------------------------------------------------


def comes_back(cls: Any, name: str, without: tuple[str, ...] = ()) -> Any:
    """Read a result, and see that it writes what it was read from, but for what the command added (`without`)."""
    values = {k: v for k, v in content(name).items() if k not in without}
    result = cls.from_dict(values)
    compare(result.to_dict(), {k: v for k, v in values.items() if k != "summary"}, name)
    assert result.summary() and result.table()
    return result


def test_a_saturation_result_is_read():
    from llava_patch.measurements.saturation.result import SaturationResult

    comes_back(SaturationResult, "saturation/saturation.json")
    agrees("saturation", saturation_numbers(SaturationResult.load("saturation/saturation.json")))


def saturation_numbers(found: Any) -> dict[str, Any]:
    return {
        "split": found.recommended_split, "window": found.recommendation.window, "image": found.image_transition,
        "text": found.text_transition, "samples": found.samples, "skipped": found.skipped, "mass": found.curves.mass,
        "image_kl": found.curves.image_kl, "text_cosine": found.curves.text_cosine,
        "fall_share": found.settings.fall_share, "checkpoint": found.facts.get("checkpoint"),
    }  # fmt: skip


def test_an_unfinished_saturation_measurement_is_refused():
    """Its key did not see norms and biases: whether it belongs to the model cannot be told any more."""
    from llava_patch.core.errors import CheckpointError
    from llava_patch.measurements.saturation.measure import STATE_FILE, State

    path = Path("saturation_unfinished") / STATE_FILE
    with pytest.raises(CheckpointError, match="format 1, this version reads 3: delete the file to start over"):
        State(path, header(str(path))["key"]).load()


def test_a_measurement_kept_for_split_auto_is_made_again():
    """For the same reason; the file stays as it was."""
    from llava_patch.measurements.saturation.auto_split import resolve_split

    before = times("cache/saturation-*.json")
    settings = Saturation(fall_share=0.8, mass_tolerance=0.4)
    for _ in range(2):
        routing = resolve_split(hf(), Routing(split="auto"), [hf_inputs()], settings, progress=False)
        assert routing == Routing(split=EXPECTED["auto split"])
    after = times("cache/saturation-*.json")
    assert len(before) == 1 and len(after) == 2 and before.items() <= after.items()


def test_gradient_statistics_of_a_checkpoint_are_read():
    from llava_patch.measurements.gradients.result import GradientsResult

    comes_back(GradientsResult, "gradients/gradients.json")
    agrees("gradients", gradient_numbers(GradientsResult.read("gradients")))


def gradient_numbers(found: Any) -> dict[str, Any]:
    return {
        "settings": vars(found.settings), "facts": found.facts, "transition": found.transition,
        "median_cosine": found.median_cosine, "median_delta": found.median_delta, "conditions": found.conditions(),
        "steps": [[s.step, s.main, s.skip, s.cosine] for s in found.steps],
        "windows": [[w.first, w.last, w.c, w.delta, w.main_trace, w.product_needed] for w in found.windows],
    }  # fmt: skip


def test_the_gradient_log_of_a_run_is_read_and_goes_on_from_its_checkpoint():
    from llava_patch import Gradients
    from llava_patch.measurements.gradients.log import StepLog
    from llava_patch.measurements.gradients.result import GradientsResult
    from llava_patch.measurements.gradients.statistics import STATE, Window

    whole = GradientsResult.read("run/gradients")
    agrees("gradients of a run", gradient_numbers(whole))
    window = Window.load(f"run/checkpoint-3/{STATE}", 2)
    tensors, values = window.state()
    agrees("unfinished window", {**values, "tensors": {name: numbers(tensor) for name, tensor in tensors.items()}})
    StepLog.resume("again", Gradients(window=2, smoothness=2.0), 3, "run/checkpoint-3")
    again = GradientsResult.read("again")
    assert again.steps == whole.steps[:3] and again.windows == whole.windows[:1] and again.facts == whole.facts


def test_a_trainers_curves_are_read():
    from llava_patch.tools.report.sections import read_curves

    agrees("curves", {name: [list(pair) for pair in pairs] for name, pairs in read_curves("run").items()})


def test_reach_is_read():
    from llava_patch.measurements.reach.measurement import ReachComparison, ReachResult

    def brief(found: Any) -> dict[str, Any]:
        parts = [[p.part.kind, p.part.number, p.part.role, p.state, p.asking, p.norm] for p in found.parts]
        side = [found.side.norm, [[k, v] for k, v in found.side.layers.items()], list(found.reading_layers)]
        return {
            "name": found.name, "split": found.split, "loss": found.loss, "samples": found.settings.samples,
            "side": side, "parts": parts,
        }  # fmt: skip

    one = comes_back(ReachResult, "reach/reach.json", ("facts",))
    agrees("reach", brief(one))
    several = comes_back(ReachComparison, "reach/reach_variants.json", ("facts",))
    agrees("reach of variants", {name: brief(several.of(name)) for name in ("lf", "pc")})


def test_drift_is_read():
    from llava_patch.measurements.drift.measurement import DriftResult

    found = comes_back(DriftResult, "drift/drift.json", ("facts",))
    brief = {name: getattr(found, name) for name in ("n_layers", "split", "samples", "checkpoint", "base", "prunes")}
    agrees("drift", {**brief, "image": vars(found.image), "text": vars(found.text)})


def test_fusion_attention_is_read():
    from llava_patch.measurements.fusion_attention.measurement import FusionAttentionResult

    found = comes_back(FusionAttentionResult, "fusion_attention/fusion_attention.json", ("facts",))
    brief = {name: getattr(found, name) for name in ("layers", "trained", "stock", "samples", "checkpoint", "base")}
    agrees("fusion attention", {**brief, "ratio": found.mean_ratio(0), "above": found.above_twice(0)})


def test_attention_maps_are_read():
    from llava_patch.measurements.attention_maps.measurement import AttentionMapsResult

    found = comes_back(AttentionMapsResult, "attention_maps/attention_maps.json", ("facts",))
    brief = [
        [one.checkpoint, one.source, one.query, one.part, one.block, one.n_blocks, one.maps, one.effective_patches()]
        for one in found.checkpoints
    ]
    agrees("attention maps", {"images": found.images, "checkpoints": brief, "correlations": found.correlations(1)})


def test_flops_are_read():
    from llava_patch.measurements.flops.result import FlopsResult

    found = comes_back(FlopsResult, "flops/flops.json", ("facts",))
    brief = {
        row.variant.name: [
            row.forward.total, row.prefill.total, row.decode.total, row.deep_image, row.cache_bytes,
            repr(row.variant.routing), repr(row.variant.pruning),
        ]
        for row in found.rows[0]
    }  # fmt: skip
    agrees("flops", {"split": found.split, "prompt": vars(found.prompts[0]), "rows": brief})


def test_a_report_that_was_begun_is_read():
    from llava_patch.tools.report.build import read

    values = read(Path("report"))
    (section,) = values["sections"]
    brief = {name: values[name] for name in ("checkpoint", "data", "base", "facts", "settings", "versions", "command")}
    brief["section"] = [section.name, section.state, section.key, section.settings, section.command]
    brief["found"] = [section.found.summary, section.found.tables[0].head, section.found.tables[0].rows[0]]
    agrees("report", {**brief, "files": section.found.files, "figures": [f.file for f in section.found.figures]})


# --- sweeps -----------------------------------------------------------------------------------------------------------


def test_the_same_sweep_repeats_no_run_and_finds_the_same():
    from llava_patch.tools.sweep.record import EVALUATION_FILE, FILE

    old = content("sweep/results.json")
    before = times(f"sweep/*/*/{FILE}", f"sweep/*/*/{EVALUATION_FILE}")
    assert len(before) == 8
    evaluate = "sh evaluate.sh --evaluated {checkpoint}"
    # Neither script is there: a run that is not known as finished fails, and the command with it.
    call("sweep", "sweep.gin", "--output", "sweep", "--evaluate", evaluate, "--", "sh", "train.sh", "--steps", "3")
    assert times(f"sweep/*/*/{FILE}", f"sweep/*/*/{EVALUATION_FILE}") == before
    compare(content("sweep/results.json"), old, "sweep")
    agrees("sweep", [[point["point"], point["summary"], point["runs"]] for point in old["points"]])
