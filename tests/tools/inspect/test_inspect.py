"""What `inspect` says of a folder is what loading it would show."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llava_patch import DeepStack, FastV, Routing, SkipLinks, patch
from llava_patch.cli.main import app
from llava_patch.core.errors import CheckpointError
from llava_patch.core.weights import read_file
from llava_patch.patching import keys
from llava_patch.patching.checkpoint import SETTINGS_FILE, WEIGHTS_FILE
from llava_patch.tools.inspect import inspect_checkpoint
from tests.support.checkpoints import load
from tests.support.release import write_fileset

from .conftest import TEXT, VISION

BOTH = {"fusion": SkipLinks(stride=2), "routing": Routing(split=2)}


def _saved(stock, out, form, methods=BOTH):
    model = load(stock)
    return model, patch(model, **methods), patch(model).save(out, form)


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_a_patched_checkpoint(stock, form, tmp_path):
    _, handle, folder = _saved(stock, tmp_path / "c", form)
    found = inspect_checkpoint(folder)
    assert (found.form, found.is_patched, found.host) == (form, True, handle.anatomy.host)
    assert found.settings["fusion"]["stride"] == 2 and found.settings["fusion"]["merge_size"] == 1
    assert found.methods() == {"fusion": handle.fusion, "routing": handle.routing}
    roles = {t.role for t in found.added}
    assert roles == {"side branch", "projector"}
    added = sum(t.parameters for t in found.added)
    branch = [p for n, p in handle.model.named_parameters() if "side_branch" in n]
    assert added == sum(p.numel() for p in (*branch, *handle.anatomy.projector.parameters()))
    assert all(len(t.shape) >= 1 and t.dtype == "float32" for t in found.added)
    assert (found.match is not None) == (form == "adapter")
    if form == "adapter":
        assert found.match.same is True and found.match.compared > 20 and found.base == stock


METHODS = [
    {"routing": Routing(split=2)},
    {"routing": Routing(split=2, freeze="side_and_fusion", fusion_layers=2)},
    {"routing": Routing(split=2, freeze="none")},
    {"fusion": SkipLinks(stride=2)},
    {"fusion": SkipLinks(stride=2, train_tower="all")},
    {"fusion": SkipLinks(stride=2, train_tower=3)},
    {"fusion": DeepStack(taps=(2, 4), start=1)},
    BOTH,
]


@pytest.mark.parametrize("methods", METHODS, ids=str)
def test_the_trainable_share_is_the_loaded_models(stock, methods, tmp_path):
    model = load(stock)
    handle = patch(model, **methods)
    if handle.fusion is None and handle.routing.freeze == "none":  # LLaVA's script leaves the tower frozen
        handle.anatomy.vision_model.requires_grad_(False)
    names = set(handle.trainable())
    trainable = sum(p.numel() for n, p in model.named_parameters() if n in names)
    total = sum(p.numel() for p in model.parameters())
    share = inspect_checkpoint(handle.save(tmp_path / "c", "full")).share
    assert (share.trainable, share.total) == (trainable, total)
    assert sum(share.by_part.values()) == trainable


def test_a_stock_checkpoint_of_either_host(stock):
    found = inspect_checkpoint(stock)
    assert found.form == "full" and not found.is_patched and not found.added
    assert found.share.trainable is None and "stock" in found.share.note
    held = sum(t.numel() for t in load(stock).parameters())
    tower = 0 if found.host == "hf" else sum(p.numel() for p in load(stock).get_vision_tower().parameters())
    assert found.parameters == held - tower


def test_another_base_is_seen(stock, tmp_path):
    _, _, folder = _saved(stock, tmp_path / "a", "adapter")
    other = tmp_path / "other"
    shutil.copytree(stock, other)
    path = next(other.glob("*.safetensors"), None) or next(other.glob("pytorch_model.bin"))
    tensors = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"}) if path.suffix == ".safetensors" else torch.save(tensors, path)
    match = inspect_checkpoint(folder, str(other)).match
    assert match.same is False and match.differing == 1 and "up_proj" in match.note
    done = CliRunner().invoke(app, ["inspect", str(folder), "--base", str(other)])
    assert done.exit_code == 1 and "NO" in done.output
    assert CliRunner().invoke(app, ["inspect", str(folder), "--base", stock]).exit_code == 0


def test_a_full_checkpoint_beside_its_base(stock, tmp_path):
    model, handle, _ = _saved(stock, tmp_path / "unused", "full")
    with torch.no_grad():
        handle.anatomy.layers[0].mlp.up_proj.weight.add_(1)
    match = inspect_checkpoint(handle.save(tmp_path / "c", "full"), stock).match
    assert match.differing == 1 and match.same is None


def test_a_base_of_the_other_host_is_not_called_another_one(files, tmp_path):
    _, _, adapter = _saved(str(files.hf), tmp_path / "a", "adapter")
    match = inspect_checkpoint(adapter, str(files.llava)).match
    assert match.same is None and "other host" in match.note
    _, _, full = _saved(str(files.hf), tmp_path / "c", "full")
    match = inspect_checkpoint(full, str(files.llava)).match
    assert match.same is not False and match.compared > 20 and match.differing == 0


def test_names_of_tensors_are_not_cut(files, tmp_path):
    _, _, folder = _saved(str(files.hf), tmp_path / "c", "full")
    output = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "80"}).output
    assert "…" not in output and "in stage 2" in " ".join(output.split())


def test_a_base_that_is_gone(files, tmp_path):
    _, _, folder = _saved(str(files.hf), tmp_path / "a", "adapter")
    record = json.loads((folder / SETTINGS_FILE).read_text())
    (folder / SETTINGS_FILE).write_text(json.dumps({**record, "base": str(tmp_path / "gone")}))
    match = inspect_checkpoint(folder).match
    assert match.same is None and "not there any more" in match.note
    with pytest.raises(CheckpointError, match=r"--base .*no such folder"):
        inspect_checkpoint(folder, str(tmp_path / "gone"))


def test_stage_1(files, tmp_path):
    model = load(str(files.llava))
    handle = patch(model, fusion=SkipLinks(stride=2))
    folder = handle.save(tmp_path / "full", "full")
    stage1 = tmp_path / "stage1"
    stage1.mkdir()
    for name in ("config.json", SETTINGS_FILE):
        shutil.copy(folder / name, stage1 / name)
    projector = {f"model.mm_projector.{n}": p for n, p in handle.anatomy.projector.state_dict().items()}
    torch.save(projector, stage1 / "mm_projector.bin")
    found = inspect_checkpoint(stage1)
    size = sum(p.numel() for p in projector.values())
    assert found.form == "projector" and found.share.trainable == size and found.parameters == size
    assert found.stage1 and "mm_projector.bin" in found.stage1[0]
    output = CliRunner().invoke(app, ["inspect", str(stage1)], env={"COLUMNS": "200"}).output
    assert "--pretrain_mm_mlp_adapter" in output


def test_lora_files(files, tmp_path):
    peft = pytest.importorskip("peft")
    model = load(str(files.llava))
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r".*layers\.\d+\.self_attn\.q_proj"))
    lora.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    projector = {
        f"base_model.model.model.mm_projector.{n}": p for n, p in model.model.mm_projector.state_dict().items()
    }
    torch.save(projector, tmp_path / "non_lora_trainables.bin")
    found = inspect_checkpoint(tmp_path, str(files.llava))
    matrices = sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)
    assert found.form == "lora" and found.share.by_part["LoRA"] == matrices
    assert found.share.by_part["projector"] == sum(p.numel() for p in projector.values())
    assert {t.role for t in found.added} == {"LoRA", "projector"}
    assert found.share.total == sum(p.numel() for p in load(str(files.llava)).parameters())  # the tower's too
    assert found.match.same is None and "the 4 matrices that they change there fit" in found.match.note
    assert inspect_checkpoint(tmp_path, str(files.hf)).match.same is None  # the same sizes, in the other host's names
    wide = write_fileset(tmp_path / "wide", vision=VISION, text={**TEXT, "hidden_size": 32}, vocab_size=512).llava
    done = CliRunner().invoke(app, ["inspect", str(tmp_path), "--base", str(wide)], env={"COLUMNS": "200"})
    assert done.exit_code == 1 and "is 32x32, the LoRA files want 64 columns" in done.output
    deep = write_fileset(tmp_path / "deep", vision=VISION, text={**TEXT, "num_hidden_layers": 2}, vocab_size=512).llava
    assert "no tensor model.layers.2" in inspect_checkpoint(tmp_path, str(deep)).match.note


def test_sampled_values_are_the_fingerprints(files, tmp_path):
    matrix = torch.randn(7, 13)
    save_file({"m": matrix}, tmp_path / "m.safetensors")
    torch.save({"m": matrix}, tmp_path / "m.bin")
    for name in ("m.safetensors", "m.bin"):
        (header,) = read_file(tmp_path / name)
        assert header.shape == (7, 13) and header.dtype == "float32" and header.parameters == 91
        for count in (1, 4, 9):
            assert header.sample(count) == keys.sample(matrix, count).tolist()


def test_json_holds_everything(stock, tmp_path):
    _, _, folder = _saved(stock, tmp_path / "a", "adapter", {**BOTH, "pruning": FastV()})
    done = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    values = json.loads(done.output)
    assert values["format"] == 1 and values["settings"]["pruning"] == {
        "method": "FastV", "layer": 2, "ratio": 0.5, "training": False, "count": "ceil"
    }  # fmt: skip
    assert set(values) == {
        "format", "patched", "checkpoint", "host", "form", "settings", "trained_tower", "parameters", "weight_bytes",
        "added", "base", "match", "share", "stage1", "versions", "files",
    }  # fmt: skip
    assert values == json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).output)


def _empty(folder):
    pass


def _no_json(folder):
    (folder / "config.json").write_text("{")


def _other_model(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def _lost_shard(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "t"}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))


def _broken_weights(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "t"}))
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0no header")


def _lost_adapter(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "t"}))
    (folder / SETTINGS_FILE).write_text(json.dumps({"format": 1, "form": "adapter", "base": "b", "fingerprint": {}}))


def _newer(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "t"}))
    (folder / SETTINGS_FILE).write_text(json.dumps({"format": 99}))


@pytest.mark.parametrize(
    "make, message",
    [
        (_empty, "not a checkpoint"), (_no_json, "not valid JSON"), (_other_model, "'bert' is not a LLaVA"),
        (_lost_shard, "one.safetensors is missing"), (_broken_weights, "cannot be read"),
        (_lost_adapter, f"{WEIGHTS_FILE} is missing"), (_newer, "format 99"),
    ],
)  # fmt: skip
def test_bad_folders_are_one_clear_error(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        CliRunner().invoke(app, ["inspect", str(tmp_path)], catch_exceptions=False)


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        inspect_checkpoint(tmp_path / "none")


def test_a_tower_that_is_not_there_leaves_the_share_unknown(files, tmp_path):
    _, handle, folder = _saved(str(files.llava), tmp_path / "c", "full")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(Path("/nowhere/tower"))}))
    share = inspect_checkpoint(folder).share
    assert share.trainable is None and "/nowhere/tower" in share.note
