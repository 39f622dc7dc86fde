"""Adapters travel: pushed to a hub and loaded from it by the hosts' own loaders, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
import torch

import llava_patch
from llava_patch import Routing, SkipLinks, patch
from llava_patch.core.errors import CheckpointError, LlavaPatchError
from llava_patch.core.hub import adapter_folder
from llava_patch.core.records import SETTINGS_FILE
from llava_patch.patching import model_card
from tests.patching.test_checkpoint import TEXT, VISION, _batch, _load, _train_a_little
from tests.support import hub as stand_in
from tests.support.models import needs_hf
from tests.support.release import write_fileset

LOADED = """
import sys, torch
from transformers import AutoConfig, LlavaForConditionalGeneration
name, inputs, out, options = sys.argv[1], sys.argv[2], sys.argv[3], eval(sys.argv[4])
if options.pop("config", None):
    options["config"] = AutoConfig.from_pretrained(name, **options)
model = LlavaForConditionalGeneration.from_pretrained(name, **options).eval()
with torch.no_grad():
    torch.save(model(**torch.load(inputs, weights_only=True)).logits, out)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_fileset(tmp_path_factory.mktemp("set"), vision=VISION, text=TEXT, vocab_size=512)


@pytest.fixture
def hub():
    with stand_in.running() as found:
        yield found


def _run(hub, tmp_path, code, *args, **environment):
    env = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_mine",
           "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1", **environment}  # fmt: skip
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def _patched(files):
    needs_hf()
    model = _load("hf", files)
    handle = patch(model, fusion=SkipLinks(stride=2), routing=Routing(split=3, freeze="none"))
    handle.anatomy.projector.requires_grad_(True)
    _train_a_little(model.model.multi_modal_projector)
    _train_a_little(handle.anatomy.decoder.side_branch)
    return model, handle


def _expected(model, tmp_path):
    batch = _batch("hf", model)
    torch.save(batch, tmp_path / "in.pt")
    with torch.no_grad():
        return model(**batch).logits


def test_a_pushed_adapter_is_loaded_from_the_hub_over_its_base_there(files, hub, tmp_path):
    torch.set_num_threads(1)
    model, handle = _patched(files)
    model.requires_grad_(False)  # an adapter of what was added
    expected = _expected(model, tmp_path)
    hub.add("some/base", files.hf)
    pushed = _run(hub, tmp_path, PUSH, files.hf, handle.save(tmp_path / "local"))
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    held = hub.repositories["me/adapter"]["main"]
    record = json.loads(held[SETTINGS_FILE])
    assert record["base"] == "some/base" and "base_from_here" not in record
    text = held["README.md"].decode()
    assert "base_model: some/base" in text and 'from_pretrained("me/adapter")' in text and "| reads | 0.5 |" in text
    assert str(tmp_path) not in text + json.dumps(record)
    assert pushed.stdout.strip() == f"{hub.address}/me/adapter/commit/{pushed.stdout.strip()[-40:]}"
    for options in ({}, {"config": True}, {"local_files_only": True}):  # the last from the cache
        done = _run(hub, tmp_path, LOADED, "me/adapter", tmp_path / "in.pt", tmp_path / "out.pt", options)
        assert done.returncode == 0, (options, done.stderr[-3000:])
        assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


PUSH = """
import sys, llava_patch
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).requires_grad_(False)
handle = llava_patch.load(model, sys.argv[2])
model.requires_grad_(False)
print(handle.push_to_hub("adapter", base="some/base", measured={"reads": 0.5}))
"""


def test_a_revision_and_a_subfolder_are_those_of_the_adapter_alone(files, hub, tmp_path):
    model, handle = _patched(files)
    model.requires_grad_(False)
    expected = _expected(model, tmp_path)
    hub.add("some/base", files.hf)
    handle.save(tmp_path / "up" / "deep", base="some/base")
    hub.add("me/several", tmp_path / "up", revision="second")
    options = {"revision": "second", "subfolder": "deep"}
    done = _run(hub, tmp_path, LOADED, "me/several", tmp_path / "in.pt", tmp_path / "out.pt", options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


ONTO = """
import sys, torch, llava_patch
from transformers import LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
if sys.argv[4] == "another":
    torch.nn.init.normal_(model.model.language_model.embed_tokens.weight)
handle = llava_patch.load(model, "me/adapter")
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[2], weights_only=True)).logits, sys.argv[3])
"""


@pytest.mark.parametrize("onto", ["its base", "another"])
def test_load_puts_an_adapter_of_the_hub_onto_a_base_in_memory_whatever_its_record_calls_it(files, hub, tmp_path, onto):
    model, handle = _patched(files)
    model.requires_grad_(False)
    expected = _expected(model, tmp_path)
    hub.add("me/adapter", handle.save(tmp_path / "saved", base="nobody/has-this"))
    done = _run(hub, tmp_path, ONTO, files.hf, tmp_path / "in.pt", tmp_path / "out.pt", onto)
    if onto == "another":
        assert done.returncode and "another base model" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


def test_base_overrides_the_one_that_the_record_names(files, hub, tmp_path):
    _, handle = _patched(files)
    hub.add("me/adapter", handle.save(tmp_path / "saved", base="nobody/has-this"))
    code = "import sys; from llava_patch.data.loaded import load_subject; load_subject('me/adapter', *sys.argv[1:])"
    lost = _run(hub, tmp_path, code)
    assert lost.returncode and "nobody/has-this" in lost.stderr.strip().splitlines()[-1]
    done = _run(hub, tmp_path, code, files.hf)
    assert done.returncode == 0, done.stderr[-3000:]


LORA = """
import sys, torch
from peft import PeftModel
from transformers import LlavaForConditionalGeneration
base = LlavaForConditionalGeneration.from_pretrained("some/base")
model = PeftModel.from_pretrained(base, "me/lora").eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[1], weights_only=True)).logits, sys.argv[2])
"""


def test_what_trained_beside_lora_comes_from_the_hub_with_it(files, hub, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = _patched(files)
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=None)).eval()
    _train_a_little(lora)
    expected = _expected(lora, tmp_path)
    lora.save_pretrained(tmp_path / "saved")
    hub.add("some/base", files.hf)
    hub.add("me/lora", tmp_path / "saved")
    done = _run(hub, tmp_path, LORA, tmp_path / "in.pt", tmp_path / "out.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True), expected)


def test_what_is_no_adapter_stays_a_name(hub, tmp_path, files):
    assert adapter_folder(str(tmp_path)) == str(tmp_path)
    hub.add("some/base", files.hf)
    code = "from llava_patch.core.hub import adapter_folder as f; print(f('some/base'), f('no/such'), f('a/b/c'))"
    assert _run(hub, tmp_path, code).stdout.strip() == "some/base no/such a/b/c"
    lost = _run(hub, tmp_path, "import torch, llava_patch; llava_patch.load(torch.nn.Linear(1, 1), 'no/such')")
    assert "no/such: no such folder; as a hub name: the hub does not give it" in lost.stderr
    offline = _run(hub, tmp_path, "import torch, llava_patch; llava_patch.load(torch.nn.Linear(1, 1), 'no/such')",
                   HF_HUB_OFFLINE="1")  # fmt: skip
    assert "no/such: no such folder; as a hub name: it is not on this machine" in offline.stderr


def test_a_folder_of_this_machine_is_not_pushed_as_a_base(files, monkeypatch):
    _, handle = _patched(files)
    from llava_patch.patching import checkpoint

    monkeypatch.setattr(checkpoint, "save", lambda *_: pytest.fail("saved first"))
    with pytest.raises(CheckpointError, match=r"its base is .*, a folder of this machine: say with base="):
        handle.push_to_hub("me/adapter")
    handle.model.config.mm_vision_tower = str(files.tower)
    with pytest.raises(CheckpointError, match="mm_vision_tower = "):
        handle.push_to_hub("me/adapter", base="some/base")


def test_a_saved_folder_explains_itself_and_keeps_a_text_of_the_user(files, tmp_path):
    _, handle = _patched(files)
    folder = handle.save_pretrained(tmp_path / "saved", measured={"exact match": 0.875})
    text = (folder / "README.md").read_text()
    assert model_card.OURS in text and "SkipLinks" in text and "split=3" in text and "| exact match | 0.875 |" in text
    handle.save(folder, measured={"exact match": 0.5})
    assert "| exact match | 0.5 |" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("mine")
    handle.save(folder)
    assert (folder / "README.md").read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"measured\['a'\] = \[1\]"):
        handle.save(tmp_path / "other", measured={"a": [1]})
    assert not (tmp_path / "other").exists()
    with pytest.raises(LlavaPatchError, match="private is for push_to_hub=True"):
        handle.save_pretrained(tmp_path / "other", private=True)
    assert llava_patch.get_handle(handle.model) is handle
