"""Routing(split="auto") in LLaVA's unmodified train.py, and when a model is loaded."""

import json
import re

import pytest

from llava_patch import Routing, get_handle
from llava_patch.core.errors import SettingError
from llava_patch.settings import gin_config as config
from tests.support.paths import LAUNCHERS
from tests.support.release import small_llava, write_fileset
from tests.support.saturating import saturate
from tests.support.tiny_train import TEXT, TRAIN, VISION
from tests.support.tiny_train import arguments as _arguments
from tests.support.tiny_train import ok as _ok
from tests.support.tiny_train import run as _run

AUTO = 'Routing.split = "auto"'
RANK = LAUNCHERS / "rank.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, RANK]


def _file_set(root, saturated):
    from PIL import Image

    model = small_llava(VISION, TEXT, 512)
    if saturated:
        decoder, projector = model.model.language_model, model.model.multi_modal_projector
        saturate(decoder.layers, decoder.embed_tokens, projector, reading=2, writing=4)
    files = write_fileset(root / "set", vision=VISION, text=TEXT, vocab_size=512, model=model)
    rows = []
    for i in range(16):
        Image.effect_noise((56, 56), 80 + i).convert("RGB").save(root / f"{i}.png")
        question = {"from": "human", "value": "<image>\nWhat is the number" + " in this picture" * 12 + "?"}
        row = {"id": str(i), "conversations": [question, {"from": "gpt", "value": str(100 + i)}]}
        if i % 4 == 3:
            question["value"] = "What is a number?"
        else:
            row["image"] = f"{i}.png"
        rows.append(row)
    (root / "v1.json").write_text(json.dumps(rows))
    return root, files


@pytest.mark.timeout(900)
def test_a_training_run_measures_on_its_own_data_and_records_the_layer(tmp_path):
    data = _file_set(tmp_path, saturated=True)
    first, second, cache = tmp_path / "llava-one", tmp_path / "llava-two", tmp_path / "cache"
    arguments = _arguments(data, 2, first, steps=2)
    text = _ok(_run([*TORCHRUN, TRAIN, *arguments, "--gin_param", AUTO], LLAVA_PATCH_CACHE=str(cache)))
    assert text.count("Bind Routing.split = 2 to fix it") == 1  # one rank measures and explains
    assert "window 2..4 of L = 6" in text and "Measured on 12 samples (4 no image: left out)" in text
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["saturation"]["recommended_split"] == 2

    for record in ("llava_patch.json", "llava_patch_adapter/llava_patch.json", "config.json"):
        values = json.loads((first / record).read_text())
        assert values.get("llava_patch", values)["routing"]["split"] == 2, record
    operative = first / "llava_patch_operative.gin"
    assert config.read([str(operative)], []).routing == Routing(split=2)
    assert "auto" not in "".join(line for line in operative.read_text().splitlines() if not line.startswith("#"))

    # the same command going on from the finished checkpoint: its split is kept, and nothing is measured
    arguments = _arguments(data, 2, second, steps=1, model_name_or_path=first)
    at = arguments.index("--pretrain_mm_mlp_adapter")
    del arguments[at : at + 2]
    kept.unlink()
    text = _ok(_run([TRAIN, *arguments, "--gin_param", AUTO], LLAVA_PATCH_CACHE=str(cache)))
    assert "already carries split 2, which is kept" in text and not list(cache.iterdir())
    assert json.loads((second / "llava_patch.json").read_text())["routing"]["split"] == 2
    assert config.read([str(second / "llava_patch_operative.gin")], []).routing == Routing(split=2)


@pytest.mark.timeout(600)
def test_no_window_stops_every_rank_before_anything_is_written(tmp_path):
    data = _file_set(tmp_path, saturated=False)
    out = tmp_path / "llava-out"
    arguments = _arguments(data, 2, out, steps=1)
    parameters = ["--gin_param", AUTO, "--gin_param", "Saturation.max_samples = 3"]
    done = _run([*TORCHRUN, TRAIN, *arguments, *parameters], LLAVA_PATCH_CACHE=str(tmp_path / "cache"))
    assert done.returncode != 0
    errors = re.findall(r'SettingError: Routing.split = "auto": 3 samples recommend no split: .*by hand', done.stderr)
    assert len(errors) >= 1, done.stderr[-3000:]
    assert not out.exists() or not any(out.iterdir())


@pytest.mark.timeout(300)
def test_a_new_projector_is_not_measured(tmp_path):
    data = _file_set(tmp_path, saturated=True)
    arguments = _arguments(data, 2, tmp_path / "llava-out", steps=1)
    at = arguments.index("--pretrain_mm_mlp_adapter")
    del arguments[at : at + 2]
    done = _run([TRAIN, *arguments, "--gin_param", AUTO], LLAVA_PATCH_CACHE=str(tmp_path / "cache"))
    assert done.returncode != 0 and "its projector is new: leave Routing out of stage 1" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_loading_has_no_samples_but_a_patched_checkpoint_needs_none(tmp_path, monkeypatch):
    from transformers import LlavaForConditionalGeneration

    from llava_patch import patch
    from llava_patch.settings import active
    from tests.support import models

    model = models.hf_model()
    model.save_pretrained(tmp_path / "stock")
    patch(model, routing=Routing(split=3)).save(tmp_path / "routed", form="full")
    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", 'Routing.split="auto"')
    active.reset()
    with pytest.raises(SettingError, match=r"run the `saturation` task on the stock checkpoint and bind Routing.split"):
        LlavaForConditionalGeneration.from_pretrained(tmp_path / "stock")
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "routed")
    assert get_handle(loaded).routing == Routing(split=3)
    assert loaded.config.llava_patch["routing"]["split"] == 3


def test_a_split_bound_by_a_macro_is_recorded_as_a_number(tmp_path, monkeypatch):
    from llava_patch import patch
    from llava_patch.integrations.training import llava as training
    from llava_patch.settings import active
    from tests.support import models

    monkeypatch.setenv("LLAVA_PATCH_GIN_PARAM", 'where = "auto"; Routing.split = %where')
    active.reset()
    assert active.configuration().routing == Routing(split="auto")
    training.write_records(patch(models.hf_model(), routing=Routing(split=3)), tmp_path)
    monkeypatch.delenv("LLAVA_PATCH_GIN_PARAM")
    assert config.read([str(tmp_path / "llava_patch_operative.gin")], []).routing == Routing(split=3)
