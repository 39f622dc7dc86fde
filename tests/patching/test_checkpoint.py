"""Patched checkpoints come back through the hosts' own loaders, in a new process, with the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import llava_patch
from llava_patch import FastV, Routing, SkipLinks, get_handle, patch
from llava_patch.core.errors import CheckpointError, SettingError
from llava_patch.patching.checkpoint import SETTINGS_FILE, WEIGHTS_FILE
from tests.support import checkpoints
from tests.support.models import IMAGE, Host, needs_hf
from tests.support.release import write_fileset

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
PATCH = {"fusion": SkipLinks(stride=2), "routing": Routing(split=3)}

# Uses nothing of llava_patch by name: the start-up hook alone must do it.
NEW_PROCESS = """
import sys, torch
host, path, inputs, out = sys.argv[1:]
batch = torch.load(inputs, weights_only=True)
if host == "hf":
    from transformers import LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(path)
else:
    from llava.model.builder import load_pretrained_model
    import inspect  # LLaVA-NeXT's builder knows GPUs and "auto", and asks for flash attention
    takes_device = "device" in inspect.signature(load_pretrained_model).parameters
    more = {"device": "cpu"} if takes_device else {"attn_implementation": "sdpa"}
    more["device_map"] = "cpu" if takes_device else "auto"
    model = load_pretrained_model(path, None, "llava-v1.5-small", **more)[1].float()
    model.get_vision_tower().float()
model.eval()
with torch.no_grad():
    torch.save(model(**batch).logits, out)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_fileset(tmp_path_factory.mktemp("set"), vision=VISION, text=TEXT, vocab_size=512)


def _load(name, files):
    if name == "hf":
        needs_hf()
        from transformers import LlavaForConditionalGeneration

        return LlavaForConditionalGeneration.from_pretrained(files.hf).eval()
    model = checkpoints.built(files.llava).float()
    model.get_vision_tower().float()
    return model.eval()


def _batch(name, model):
    host = Host(name, model)
    batch = host.batch([(2, IMAGE, 5), (3, IMAGE, 5)]).inputs
    if name == "hf":
        batch["input_ids"][batch["input_ids"] == 95] = model.config.image_token_id
    return batch


def _train_a_little(model):
    """Give what trains values that differ from the base, without depending on order."""
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            parameter.copy_(parameter.half().float())  # llava's loader rounds to half precision


def _in_new_process(name, path, batch, tmp_path):
    torch.save(batch, tmp_path / "in.pt")
    command = [sys.executable, "-c", NEW_PROCESS, name, str(path), str(tmp_path / "in.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "out.pt", weights_only=True)


@pytest.mark.parametrize("name", ["hf", "llava"])
@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_new_process_gets_the_same_logits(name, form, files, tmp_path):
    torch.set_num_threads(1)
    model = _load(name, files)
    batch = _batch(name, model)
    with torch.no_grad():
        stock = model(**batch).logits
    handle = patch(model, fusion=PATCH["fusion"])
    handle.anatomy.projector.requires_grad_(True)
    _train_a_little(handle.anatomy.projector)
    patch(model, routing=PATCH["routing"])
    _train_a_little(model)
    with torch.no_grad():
        expected = model(**batch).logits
    assert not torch.allclose(expected, stock, atol=1e-2)
    handle.save(tmp_path / "llava-saved", form=form)
    assert torch.equal(_in_new_process(name, tmp_path / "llava-saved", batch, tmp_path), expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"routing": Routing(variant="kv", split=3), "pruning": FastV(2, 0.5)},
        {"routing": Routing(split=1, fusion_layers=(2, 5), side_layers=2)},
        {"routing": Routing(variant="vtw", split=2)},
        {"pruning": FastV(1, 0.75, training=True)},
    ],
    ids=["kv+fastv", "sparse", "vtw", "fastv"],
)
@pytest.mark.parametrize("form", ["adapter", "full"])
def test_every_method_comes_back(form, settings, files, tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = _load("hf", files)
    batch = _batch("hf", model)
    handle = patch(model, **settings)
    _train_a_little(getattr(handle.anatomy.decoder, "side_branch", torch.nn.Identity()))
    with torch.no_grad():
        expected = model(**batch).logits
    handle.save(tmp_path / "saved", form=form)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert get_handle(again).settings() == handle.settings()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)


def test_an_adapter_holds_only_what_was_added(files, tmp_path):
    model = _load("hf", files)
    handle = patch(model, **PATCH)
    folder = handle.save(tmp_path / "adapter")
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS_FILE, "pt") as stream:
        names = set(stream.keys())
    assert all("side_branch" in n or "multi_modal_projector" in n for n in names)
    record = json.loads((folder / SETTINGS_FILE).read_text())
    assert record["routing"]["split"] == 3 and record["base"] == str(files.hf) and record["fingerprint"]
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*"))
    size = sum(f.stat().st_size for f in folder.iterdir() if f.suffix == ".safetensors")
    assert size < sum(f.stat().st_size for f in Path(files.hf).glob("*.safetensors"))


def test_load_onto_a_base_in_memory(files, tmp_path):
    model = _load("hf", files)
    batch = _batch("hf", model)
    with patch(model, **PATCH) as handle:
        _train_a_little(model)
        with torch.no_grad():
            expected = model(**batch).logits
        handle.save(tmp_path / "adapter")
    again = llava_patch.load(model, tmp_path / "adapter")
    assert (again.fusion, again.routing) == (PATCH["fusion"], PATCH["routing"])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_a_stock_checkpoint_loads_as_before(files):
    model = _load("hf", files)
    assert llava_patch.get_handle(model) is None
    assert not hasattr(model.config, "llava_patch")


def _saved(files, tmp_path):
    model = _load("hf", files)
    with patch(model, **PATCH) as handle:
        handle.save(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_another_base_is_refused(files, tmp_path):
    model, folder = _saved(files, tmp_path)
    with torch.no_grad():
        for parameter in model.model.language_model.layers.parameters():
            parameter.mul_(1.1)
    with pytest.raises(CheckpointError, match=r"another base model: .*language_model"):
        llava_patch.load(model, folder)
    assert llava_patch.get_handle(model) is None


def test_another_tower_is_another_base(files, tmp_path):
    model, folder = _saved(files, tmp_path)
    tower = model.model.vision_tower
    torch.nn.init.normal_(getattr(tower, "vision_model", tower).encoder.layers[3].mlp.fc1.weight)
    with pytest.raises(CheckpointError, match=r"another base model: .*vision_tower.*layers.3.mlp.fc1"):
        llava_patch.load(model, folder)


def test_a_base_that_has_moved_is_named(files, tmp_path):
    from transformers import LlavaForConditionalGeneration

    _, folder = _saved(files, tmp_path)
    record = json.loads((folder / SETTINGS_FILE).read_text())
    (folder / SETTINGS_FILE).write_text(json.dumps({**record, "base": "/no/such/model"}))
    with pytest.raises(CheckpointError, match=r"base model /no/such/model is not there"):
        LlavaForConditionalGeneration.from_pretrained(folder)


def test_llavas_loader_with_a_model_base(files, tmp_path):
    """A stage-1 folder (config and projector) over its language model, as LLaVA's evaluation scripts load it."""

    model = _load("llava", files)
    batch = _batch("llava", model)
    handle = patch(model, fusion=PATCH["fusion"])
    _train_a_little(handle.anatomy.projector.requires_grad_(True))
    with torch.no_grad():
        expected = model(**batch).logits
    stage1 = tmp_path / "llava-stage1"
    model.config.save_pretrained(stage1)
    tensors = {f"model.mm_projector.{k}": v for k, v in handle.anatomy.projector.state_dict().items()}
    torch.save(tensors, stage1 / "mm_projector.bin")
    again = checkpoints.built(stage1, files.language_model).float()
    again.get_vision_tower().float()
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch).logits, expected)


@pytest.mark.parametrize("case", ["silent", "written by an older version", "over an adapter"])
def test_a_configuration_of_its_own_class_leads_to_what_lies_beside_it(files, tmp_path, case):
    """LLaVA's builder may load a LoRA run's so: it then names no folder, or one that an older version wrote."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    model = _load("llava", files)
    handle = patch(model, fusion=SkipLinks(stride=2, train_tower=2))
    _train_a_little(handle.anatomy.vision_model)
    lora, base = tmp_path / "llava-lora", str(files.llava)
    if case == "over an adapter":
        base = str(handle.save(tmp_path / "llava-adapter"))
        _train_a_little(handle.anatomy.vision_model)
    model.config.save_pretrained(lora)
    beside = {f"base_model.model.{n}": t for n, t in model.state_dict().items() if ".encoder.layers.6." in n}
    torch.save(beside, lora / "non_lora_trainables.bin")
    values = json.loads((lora / "config.json").read_text())
    if case == "written by an older version":
        (lora / "config.json").write_text(json.dumps({**values, "_name_or_path": base}))
    config, unused = LlavaConfig.from_pretrained(pretrained_model_name_or_path=lora, other=1, return_unused_kwargs=True)
    assert config._name_or_path == str(lora) and unused == {"other": 1}
    again = LlavaLlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=base, config=config)
    again.get_vision_tower().load_model()
    loaded = {f"base_model.model.{n}": t for n, t in again.state_dict().items()}
    assert beside and all(torch.equal(loaded[n], t) for n, t in beside.items())
    with pytest.raises(CheckpointError, match="does not say beside which checkpoint"):
        LlavaLlamaForCausalLM.from_pretrained(base, config=LlavaConfig(**{**values, "_name_or_path": ""}))
    stock = tmp_path / "stock"
    LlavaConfig(_name_or_path="as it says").save_pretrained(stock)
    assert LlavaConfig.from_pretrained(stock)._name_or_path == ""  # a stock one stays as it is


def test_an_adapter_opens_with_the_path_of_its_configuration(files, tmp_path):
    from transformers import LlavaForConditionalGeneration

    folder = patch(_load("hf", files), routing=Routing(split=2)).save(tmp_path / "adapter")
    for config in (folder, str(folder)):
        again = LlavaForConditionalGeneration.from_pretrained(folder, config=config)
        assert get_handle(again).routing == Routing(split=2)


def test_an_adapter_beside_lora_is_refused(files, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_load("hf", files), LoraConfig(r=2, target_modules=["q_proj"]))
    handle = patch(model, routing=Routing(split=3, freeze="none"))
    with pytest.raises(CheckpointError, match="LoRA"):
        handle.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_full_save_over_an_adapter_leaves_no_adapter(files, tmp_path):
    model = _load("hf", files)
    with patch(model, **PATCH) as handle:
        handle.save(tmp_path / "x")
        handle.save(tmp_path / "x", form="full")
    assert not (tmp_path / "x" / WEIGHTS_FILE).exists()


def test_a_base_in_another_precision_is_the_same_base(files, tmp_path):
    model, folder = _saved(files, tmp_path)
    llava_patch.load(model.to(torch.bfloat16), folder).remove()


def test_missing_and_misshapen_tensors_are_named(files, tmp_path):
    from safetensors.torch import load_file, save_file

    model, folder = _saved(files, tmp_path)
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(n for n in tensors if "side_branch" in n)
    save_file({k: v for k, v in tensors.items() if k != name}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        llava_patch.load(model, folder)
    save_file({**tensors, name: tensors[name][:-1].clone()}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        llava_patch.load(model, folder)


def test_a_full_checkpoint_without_its_added_weights_is_refused(files, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import LlavaForConditionalGeneration

    model = _load("hf", files)
    with patch(model, **PATCH) as handle:
        folder = handle.save(tmp_path / "full", form="full")
    path = next(folder.glob("model*.safetensors"))
    save_file({k: v for k, v in load_file(path).items() if "side_branch" not in k}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="side_branch"):
        LlavaForConditionalGeneration.from_pretrained(folder)


def test_a_full_checkpoint_that_lacks_the_hosts_own_weights_is_refused(files, tmp_path):
    model = _load("hf", files)
    patch(model, **PATCH).save(tmp_path / "full", form="full")

    def lose(tensors):
        del tensors[next(name for name in sorted(tensors) if "vision_tower" in name)]

    folder = checkpoints.edited(tmp_path / "full", tmp_path / "lost", change=lose)
    with pytest.raises(CheckpointError, match=r"lacks .*vision_tower.*\(1 tensors\).*names that this"):
        _load("hf", SimpleNamespace(hf=folder))


def test_a_full_checkpoint_of_a_newer_format_is_refused(files, tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = _load("hf", files)
    with patch(model, **PATCH) as handle:
        folder = handle.save(tmp_path / "full", form="full")
    config = json.loads((folder / "config.json").read_text())
    config["llava_patch"]["format"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: .*format 99"):
        LlavaForConditionalGeneration.from_pretrained(folder)


def test_a_checkpoint_of_another_fusion_is_refused(files, tmp_path):
    model, folder = _saved(files, tmp_path)
    with patch(model, fusion=SkipLinks(stride=3)), pytest.raises(SettingError, match="already carries fusion"):
        llava_patch.load(model, folder)


@pytest.mark.parametrize("name", ["hf", "llava"])
def test_a_stock_checkpoint_grows_taps(name, files, monkeypatch, tmp_path):
    """The host's own loader with a fusion asked for by the environment: until it trains, the stock model's output."""
    model = _load(name, files)
    batch = _batch(name, model)
    with torch.no_grad():
        stock = model(**batch).logits
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "SkipLinks.stride = 2")
    grown = _load(name, files)
    handle = get_handle(grown)
    assert handle.fusion == SkipLinks(stride=2)
    assert handle.anatomy.first_linear()[2].in_features == 4 * 32
    with torch.no_grad():
        assert torch.equal(grown(**batch).logits, stock)


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_a_checkpoint_with_another_fusion_than_asked_for_is_refused(form, files, monkeypatch, tmp_path):
    needs_hf()
    from transformers import LlavaForConditionalGeneration

    patch(_load("hf", files), fusion=PATCH["fusion"]).save(tmp_path / "saved", form=form)
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", "SkipLinks.stride = 3")
    with pytest.raises(SettingError, match=r"already carries fusion SkipLinks\(stride=2.*stride=3"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ('{"format": 99}', "format 99"), (None, f"{SETTINGS_FILE}: is missing")],
)
def test_damaged_settings(files, tmp_path, content, message):
    model, folder = _saved(files, tmp_path)
    if content is None:
        (folder / SETTINGS_FILE).unlink()
    else:
        (folder / SETTINGS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        llava_patch.load(model, folder)


def test_saving_refuses_what_cannot_work(files, tmp_path):
    model = _load("hf", files)
    handle = patch(model, **PATCH)
    with pytest.raises(CheckpointError, match="expected"):
        handle.save(tmp_path / "x", form="both")
    with pytest.raises(CheckpointError, match="base model's own folder"):
        handle.save(files.hf)
    handle.remove()
    with pytest.raises(CheckpointError, match="removed"):
        handle.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_trained_tower_weights_come_back_on_llava(files, tmp_path):
    model = _load("llava", files)
    batch = _batch("llava", model)
    handle = patch(model, fusion=SkipLinks(stride=2, train_tower="all"))
    _train_a_little(handle.anatomy.vision_model)
    with torch.no_grad():
        expected = model(**batch).logits
    handle.save(tmp_path / "llava-full", form="full")
    assert torch.equal(_in_new_process("llava", tmp_path / "llava-full", batch, tmp_path), expected)


def test_hub_files_load_as_the_hub_has_them(files):
    """The stock projector checkpoint and the tokenizer files."""
    from transformers import AutoTokenizer

    model = _load("llava", files)
    tensors = torch.load(files.projector, weights_only=True)
    assert set(tensors) == {f"model.mm_projector.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    handle = patch(model, fusion=SkipLinks(stride=2))
    handle.remove()
    model.load_state_dict(tensors, strict=False)
    for name, tensor in tensors.items():
        assert torch.equal(model.state_dict()[name], tensor.float())
    tokenizer = AutoTokenizer.from_pretrained(files.language_model, use_fast=False)
    text = "What is the number in the image?"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("numel", [2**24 - 1, 2**24, 32064 * 1024, 32000 * 4096])
def test_fingerprints_of_large_tensors_stay_inside_them(numel):
    from llava_patch.patching.keys import sample

    values = torch.zeros(1, dtype=torch.bool).expand(numel)  # takes no memory
    assert len(sample(values[None], 8)) == 8
