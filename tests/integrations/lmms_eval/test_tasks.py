"""Our tasks with a live tiny model of either host, without lmms-eval's command line."""

from __future__ import annotations

import dataclasses
import json
import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from llava_patch.core import registry
from llava_patch.core.errors import CheckpointError, HostError, InputError, SettingError
from llava_patch.core.paths import eval_tasks_dir
from llava_patch.data.pages import Pages
from llava_patch.integrations.lmms_eval import rprobe_runs, runner
from tests.support import fileset

FAST = {"steps": 3, "train_pages": 6, "heldout_pages": 4, "batch_size": 4, "examples": 2}


def load(name: str, **metadata: Any) -> Any:
    """A task as lmms-eval makes it from its YAML, with some metadata replaced."""
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    manager = TaskManager(include_path=str(eval_tasks_dir()), include_defaults=False)
    config = load_yaml_config(manager._get_yaml_path(name), mode="full")
    config["metadata"] = {**config["metadata"], **metadata}
    return config["class"](config=config)


def run(task: Any, lm: Any, limit: int | None = None) -> tuple[list[dict], dict[str, Any]]:
    """Requests, answers, per-document results and the table, as the evaluator does it."""
    name = task.config.task
    lm.task_dict[name] = task.dataset
    task.build_all_requests(limit=limit)
    answers = _method(task)(lm, task.instances)
    results = [task.process_results(doc, [answer]) for doc, answer in zip(task.eval_docs, answers)]
    for result in results:
        json.dumps(result)  # what --log_samples writes
    table = {m: f([r[m] for r in results]) for m, f in task.aggregation().items()}
    return results, table


def _method(task: Any) -> Any:
    from lmms_eval.api.model import lmms

    return getattr(lmms, task.OUTPUT_TYPE)


def test_saturation_fills_the_table_and_writes_beside_the_output(lm: Any, tmp_path: Path) -> None:
    task = load("saturation", documents=3)
    task.args = Namespace(output_path=str(tmp_path / "out"), model_args="pretrained=/somewhere/a/model,dtype=auto")
    results, table = run(task, lm)
    assert len(results) == 3 and set(table) == set(results[0])
    assert 0 < table["attention_mass_final"] < 1
    folder = tmp_path / "out" / "a__model" / "saturation"
    written = json.loads((folder / "saturation.json").read_text())
    assert (folder / "saturation.png").stat().st_size > 10_000
    assert written["samples"] == 3 and written["n_layers"] == 4
    assert table["attention_mass_final"] == pytest.approx(written["attention_mass"][-1])
    split = written["recommended_split"]
    assert table["recommended_split"] == split if split is not None else math.isnan(table["recommended_split"])
    assert results[0]["recommended_split"]["reason"] and written["reason"] and written["patch"] is None
    assert table["vision_transition_layer"] == written["image_transition_layer"]
    assert table["text_transition_layer"] == written["text_transition_layer"]
    assert task.higher_is_better() == dict.fromkeys(table)


def test_requests_stay_out_of_the_response_cache() -> None:
    from lmms_eval.caching.response_cache import extract_gen_kwargs, is_deterministic

    task = load("saturation", documents=2)
    task.build_all_requests(limit=1)
    assert len(task.instances) == 1
    assert not is_deterministic(task.OUTPUT_TYPE, extract_gen_kwargs(task.instances[0]))


def test_aggregation_of_absent_layers_and_without_output_path() -> None:
    item = {
        "task": "saturation", "folder": None, "settings": {}, "patch": None,
        "curves": {
            "image_states": [4, 0, 4], "image_keys": [4, 0, 4],
            "image_cosine": [0.9, None, 0.9], "text_cosine": [0.9] * 3, "head_mass": [[0.5], [0.0], [0.5]],
            "image_kl": [2.0, None, 0.0], "text_kl": [2.0, 0.5, 0.0],
        },
    }  # fmt: skip
    task = runner.names("saturation")
    scored = task["process_results"]({}, [json.dumps(item)])
    assert math.isnan(task["recommended_split"]([scored["recommended_split"]]))
    # The image is gone before its KL falls; at the last layer, which has it again, KL is 0 by definition.
    assert math.isnan(task["vision_transition_layer"]([scored["vision_transition_layer"]] * 2))
    assert scored["vision_transition_layer"]["layer"] is None
    assert task["text_transition_layer"]([scored["text_transition_layer"]] * 2) == 1
    assert "already routed" in scored["recommended_split"]["reason"]


def test_rprobe_fills_the_table_from_its_documents(lm: Any, tmp_path: Path) -> None:
    task = load("rprobe", settings=FAST)
    task.args = Namespace(output_path=str(tmp_path / "out"), model_args="pretrained=model")
    results, table = run(task, lm)
    written = json.loads((tmp_path / "out" / "model" / "rprobe" / "rprobe.json").read_text())
    assert (tmp_path / "out" / "model" / "rprobe" / "rprobe.png").is_file()
    assert len(results) == 4 and [r["rprobe_run"]["id"] for r in results] == list(task.dataset["test"]["id"])
    for name in ("mse", "fvu", "psnr"):
        assert table[f"rprobe_{name}"] == pytest.approx(written[name], rel=1e-6)
    assert task.higher_is_better() == {
        "rprobe_mse": False, "rprobe_fvu": False, "rprobe_psnr": True, "rprobe_steps": False,
        "rprobe_steps_half_fvu": False,
    }  # fmt: skip


def test_limit_takes_means_over_fewer_documents_of_the_same_probe(tmp_path: Path) -> None:
    from .conftest import make_lm

    lm = make_lm("hf", tmp_path)
    everything, _ = run(load("rprobe", settings=FAST), lm)
    few, table = run(load("rprobe", settings=FAST), lm, limit=2)
    assert len(few) == 2 and few == everything[:2]
    tokens = [r["rprobe_mse"]["tokens"] for r in few]
    expected = sum(r["rprobe_mse"]["mse"] * n for r, n in zip(few, tokens)) / sum(tokens)
    assert table["rprobe_mse"] == pytest.approx(expected)


def test_variants_differ_only_in_their_settings() -> None:
    variants = {name: load(name).settings for name in ("rprobe", "rprobe_masked", "rprobe_nolang")}
    both = load("rprobe_masked_nolang").settings
    assert (both.masked, both.text) == (True, False)
    assert [(s.masked, s.text) for s in variants.values()] == [(False, True), (True, True), (False, False)]


def test_steps_that_say_nothing_are_null_in_lmms_evals_json_and_not_available_in_its_table() -> None:
    from lmms_eval.evaluator_utils import TaskOutput
    from lmms_eval.utils import make_table

    run_facts = {"target_variance": 2.0, "steps": None, "steps_half_fvu": 7, "warnings": []}
    document = {"id": "a", "text": "b", "tokens": 3, "mse": 0.5, "psnr": 20.0}
    item = rprobe_runs.process_results({}, [json.dumps({"document": document, "run": run_facts})])
    assert rprobe_runs.steps([item["rprobe_steps"]]) is None
    assert rprobe_runs.steps([item["rprobe_steps_half_fvu"]]) == 7
    assert rprobe_runs.fvu([item["rprobe_fvu"]]) == 0.25
    task = SimpleNamespace(aggregation=lambda: {"rprobe_steps": rprobe_runs.steps})
    output = TaskOutput(task=task, task_name="rprobe", task_config={})
    output.sample_metrics["rprobe_steps", "none"] = [item["rprobe_steps"]] * 2
    output.calculate_aggregate_metric(bootstrap_iters=10)
    output.calculate_clt_aggregate_metric()
    results = dict(output.agg_metrics)
    assert json.loads(json.dumps(results, allow_nan=False))["rprobe_steps,none"] is None
    table = make_table({"results": {"rprobe": results}, "n-shot": {}, "higher_is_better": {}})
    assert "|rprobe_steps|" in table.replace(" ", "") and "N/A" in table


def test_two_samples_of_one_name_are_refused(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [dataclasses.replace(page, id="twice", document=page.id) for page in Pages(6, fileset.SIDE, 0)]
    monkeypatch.setattr(rprobe_runs, "own_samples", lambda *given: (pages[:4], pages[4:]))
    task = load("rprobe", settings=FAST)
    monkeypatch.setattr(task, "data", lambda: "own")
    with pytest.raises(InputError, match="rprobe: two held-out samples are called 'twice'"):
        run(task, lm)


def test_a_document_that_could_not_be_used_counts_for_nothing() -> None:
    run_facts = {"target_variance": 2.0, "steps": None, "steps_half_fvu": 7, "warnings": []}
    document = {"id": "a", "text": "b", "tokens": 3, "mse": 0.5, "psnr": 20.0}
    items = [
        rprobe_runs.process_results({}, [json.dumps({"document": one, "run": run_facts})]) for one in (None, document)
    ]
    assert rprobe_runs.mse([item["rprobe_mse"] for item in items]) == 0.5
    assert rprobe_runs.fvu([item["rprobe_fvu"] for item in items]) == 0.25
    assert rprobe_runs.psnr([item["rprobe_psnr"] for item in items]) == 20
    assert rprobe_runs.mse([None]) is rprobe_runs.fvu([None]) is rprobe_runs.psnr([None]) is None


def write_samples(folder: Path) -> Path:
    lines = []
    for i in range(5):
        Image.new("RGB", (40, 30), (40 * i, 90, 200 - 30 * i)).save(folder / f"{i}.png")
        lines += [{"image": f"{i}.png", "text": f"line {j}", "box": [2, 3 + 12 * j, 35, 12 + 12 * j]} for j in range(2)]
    path = folder / "samples.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_ones_own_data_are_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from .conftest import make_lm

    path = write_samples(tmp_path)
    monkeypatch.setenv("LLAVA_PATCH_RPROBE_DATA", str(path))
    task = load("rprobe", settings={**FAST, "heldout_share": 0.4})
    ids = list(task.dataset["test"]["id"])
    assert len(ids) == 4 and all(name.startswith(f"{path.name}:") for name in ids)  # two images, two lines each
    results, table = run(task, make_lm("hf", tmp_path))
    assert [r["rprobe_run"]["id"] for r in results] == ids and table["rprobe_mse"] > 0


def test_data_that_was_skipped_is_told_and_kept_with_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from .conftest import make_lm

    path = write_samples(tmp_path)
    path.write_text(path.read_text() + "\n{")
    monkeypatch.setenv("LLAVA_PATCH_RPROBE_DATA", str(path))
    task = load("rprobe", settings={**FAST, "broken": "skip", "heldout_share": 0.4})
    assert list(task.dataset["test"]["id"])
    assert "1 things were skipped; the first" in capsys.readouterr().err
    task.args = Namespace(output_path=str(tmp_path / "out"), model_args="pretrained=/somewhere/model")
    results, _ = run(task, make_lm("hf", tmp_path))
    assert any("samples.jsonl:11: not JSON" in note for note in results[0]["rprobe_run"]["warnings"])
    (file,) = (tmp_path / "out").rglob("rprobe.json")
    assert json.loads(file.read_text())["facts"]["skipped_by_reader"] == 1


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", r"samples.jsonl:2: not JSON"),
        ("[]", r":2: expected an object"),
        ('{"image": "0.png", "text": ""}', r":2: lacks box"),
        ('{"image": "no.png", "text": "", "box": [0, 0, 1, 1]}', r":2: image .*no.png is missing"),
        ('{"image": "0.png", "text": "", "box": [0, 0, 1]}', r":2: box \[0, 0, 1\]"),
    ],
)
def test_bad_data_name_file_and_line(tmp_path: Path, line: str, words: str) -> None:
    from llava_patch.data.readers import read_jsonl

    path = write_samples(tmp_path)
    path.write_text("\n".join([path.read_text().splitlines()[0], line]))
    with pytest.raises(InputError, match=words):
        read_jsonl(path)


def test_unknown_settings_and_foreign_models_are_refused() -> None:
    with pytest.raises(SettingError, match=r"task saturation: metadata.settings names share"):
        load("saturation", settings={"share": 1})
    with pytest.raises(HostError, match="llava_hf"):
        runner.answer(registry.measurement("saturation"), object(), [object()])


def test_prompt_of_a_model_without_template_is_llavas_own(tmp_path: Path) -> None:
    from llava_patch.integrations.lmms_eval.runner import reach

    from .conftest import make_lm

    lm = make_lm("hf", tmp_path)
    image = Image.new("RGB", (28, 28))
    templated = reach(lm).forward_inputs(image, "What?")
    lm._image_processor.chat_template = None
    plain = reach(lm).forward_inputs(image, "What?")
    texts = [lm.tokenizer.decode(i["input_ids"][0]) for i in (templated, plain)]
    assert texts[0].startswith("USER:") and texts[1].startswith("A chat between a curious user")
    assert all(text.count("<image>") == (fileset.SIDE // fileset.PATCH) ** 2 for text in texts)


def moved_copy(lm: Any, folder: Path, layer: int) -> Path:
    """The model's own weights as a checkpoint, with one decoder layer changed."""
    from llava_patch.hosts.anatomy import find

    for parameter in lm.model.parameters():
        parameter.data = parameter.data.half().float()  # llava's loader reads weights in float16
    weight = find(lm.model).layers[layer].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.5)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    if hasattr(lm._image_processor, "tokenizer"):
        lm._image_processor.save_pretrained(folder)
    with torch.no_grad():
        weight.copy_(before)
    return folder


def test_drift_fills_the_table_from_all_positions_of_all_documents(lm: Any, tmp_path: Path) -> None:
    base = moved_copy(lm, tmp_path / "llava-base", 2)
    task = load("drift", documents=3, settings={"base": str(base)})
    task.args = Namespace(output_path=str(tmp_path / "out"), model_args="pretrained=model")
    results, table = run(task, lm)
    written = json.loads((tmp_path / "out" / "model" / "drift" / "drift.json").read_text())
    assert (tmp_path / "out" / "model" / "drift" / "drift.png").stat().st_size > 8_000
    assert written["image"]["median"][:2] == written["text"]["median"][:2] == [1.0, 1.0]
    assert table["drift_image"] == min(written["image"]["median"]) < 1
    assert table["drift_text"] == min(written["text"]["median"]) < 1
    assert written["samples"] == len(results) == 3 and written["base"] == str(base)
    assert set(task.higher_is_better()) == set(table)


def test_fusion_attention_fills_the_table(lm: Any, tmp_path: Path) -> None:
    base = moved_copy(lm, tmp_path / "llava-base", 3)
    task = load("fusion_attention", documents=2, settings={"base": str(base), "layers": [1, 3]})
    task.args = Namespace(output_path=str(tmp_path / "out"), model_args="pretrained=model")
    results, table = run(task, lm)
    written = json.loads((tmp_path / "out" / "model" / "fusion_attention" / "fusion_attention.json").read_text())
    assert [layer["layer"] for layer in written["layers"]] == [1, 3] and written["samples"] == 2
    means = [layer["trained_mean"] for layer in written["layers"]]
    assert table["fusion_attention_mass"] == pytest.approx(sum(means) / 2)
    assert table["fusion_attention_ratio"] == 1 and table["heads_above_twice_stock"] == 0  # the change comes later
    single = load("fusion_attention", documents=1, settings={"base": str(base), "layers": [1, 3]})
    first = run(single, lm)[0][0]["fusion_attention_mass"]["result"]["layers"][0]["trained_mean"]
    assert first == results[0]["fusion_attention_mass"]["result"]["layers"][0]["trained_mean"]


def test_a_comparison_without_a_base_is_an_error(lm: Any) -> None:
    for name, setting in (("drift", "Drift.base"), ("fusion_attention", "FusionAttention.base")):
        with pytest.raises(CheckpointError, match=f"say with {setting} what to compare it with"):
            run(load(name, documents=1), lm)
