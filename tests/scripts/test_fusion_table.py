"""The table of fusions: its arms, the launch commands, and the numbers; the whole is `scripts/fusion_table.sh`."""

import json
import math
import random

import pytest
from fusion_table import arms, measure, table, train
from quickstart.model import SMALL_TEXT, SMALL_VISION
from quickstart.steps import Lacking

from llava_patch.settings import gin_config as config

BLOCKS, MAIN, LAYERS = SMALL_VISION["num_hidden_layers"], SMALL_VISION["num_hidden_layers"] - 1, 8


def _fusion(arm, stage):
    bindings = arm.parameters(stage)
    return config.read([], bindings).fusion if bindings else None


def test_ten_arms_plain_and_each_fusion_with_and_without_detach():
    plain, tower, *pairs = arms.ARMS
    assert len(pairs) == 8 and plain.parameters(1) == plain.parameters(2) == tower.parameters(1) == []
    assert _fusion(tower, 2).layers == () and _fusion(tower, 2).train_tower == "all"
    for attached, detached in zip(pairs[::2], pairs[1::2], strict=True):
        first, second = _fusion(attached, 2), _fusion(detached, 2)
        assert first.detach in (0, ()) and second.detach not in (0, ())
        assert {**vars(first), "detach": None} == {**vars(second), "detach": None}  # nothing else differs
        assert attached.detached == "none" and detached.detached.startswith("block")


@pytest.mark.parametrize("arm", arms.BY_NAME.values(), ids=lambda arm: arm.name)
def test_every_arm_fits_the_small_model(arm):
    assert SMALL_TEXT["num_hidden_layers"] == LAYERS
    if arm.fusion is None:
        return
    fusion = _fusion(arm, 2)
    assert fusion.train_tower == arm.train_tower
    if arm.settings == arms.NO_TAPS:
        return
    assert _fusion(arm, 1).train_tower == "frozen"
    blocks = dict(arm.settings)
    named = blocks.get("layers") or blocks.get("taps") or sum(blocks.get("groups", ()), ())
    assert named and max(named) <= MAIN < BLOCKS
    if arm.fusion == "DeepStack":
        assert fusion.start + (len(fusion.taps) - 1) * fusion.interval < LAYERS


def test_choosing_arms_keeps_the_tables_order():
    assert arms.choose(None) == list(arms.ARMS)
    assert [arm.name for arm in arms.choose("dense, plain")] == ["plain", "dense"]
    with pytest.raises(ValueError, match=r"no arm plane; there are plain, tower, skiplinks"):
        arms.choose("plane")


def test_arms_differ_in_their_gin_bindings_alone(tmp_path):
    for stage in (1, 2):
        commands = []
        for arm in arms.ARMS:
            words = train.command(arm, stage, train.Recipe(), tmp_path, tmp_path / "arm", tmp_path / "zero2.json")
            bindings = arm.parameters(stage)
            assert words[len(words) - 2 * len(bindings) :: 2] == ["--gin_param"] * len(bindings)
            commands.append(words[: len(words) - 2 * len(bindings)])
        assert all(command == commands[0] for command in commands)
        assert commands[0][-1] == "Flags.seed = 42" and str(train.llava_train()) in commands[0]
        assert ("--tune_mm_mlp_adapter" in commands[0]) == (stage == 1)
        assert "--use_cpu" not in commands[0]  # it would switch DeepSpeed off
    with pytest.raises(ValueError, match="multiple of 2"):
        train.Recipe(batch_size=3)


def test_intervals():
    low, high = measure.wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))  # Wilson (1927), by hand
    assert measure.wilson(0, 10)[0] == pytest.approx(0) and measure.wilson(10, 10)[1] == pytest.approx(1)
    mean, low, high = measure.paired([True, False, False, False], [True, True, True, False])
    assert mean == 0.5 and high - low == pytest.approx(2 * 1.959964 * 0.5 / 2)
    assert measure.paired([True, False], [True, False]) == (0, 0, 0)  # on the same images: no doubt about no difference


def test_what_is_read_of_a_run(tmp_path):
    log = tmp_path / "stage2.log"
    log.write_text("x\n  Number of trainable parameters = 1,845,632\n")
    assert measure.trained_parameters(log) == 1845632
    log.write_text("nothing\n")
    with pytest.raises(Lacking, match="Number of trainable parameters"):
        measure.trained_parameters(log)
    assert measure.final_loss([9.0] * 10 + [1.0] * (measure.FINAL_STEPS - 2) + [12.0, 13.0]) == 1.0  # text alone
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="finite"):
            measure.final_loss(bad)


def test_the_table_says_what_was_measured(tmp_path):
    rng = random.Random(0)
    records = {}
    for place, arm in enumerate(arms.ARMS):
        right = [rng.random() < 0.5 + place / 20 for _ in range(200)]
        records[arm.name] = {
            "final_loss": [0.9, 0.2 + place], "losses": [[1.0, 0.9], [3.0, 2.0, 1.0]], "trained_parameters": [10, 2000],
            "exact_match": sum(right) / 200, "interval": measure.wilson(sum(right), 200),
            "exact_match_other_image": 0.0, "right": right,
        }  # fmt: skip
    setting = {
        "recipe": {"steps": (3, 4), "learning_rates": (1e-3, 2e-3), "batch_size": 64, "seed": 42},
        "base": {"tower_stage": 5, "answer_stage": 6}, "ranks": 2,
    }  # fmt: skip
    found = table.collect(list(arms.ARMS), records, setting)
    paths = table.write(found, tmp_path)
    assert [path.name for path in paths] == ["fusion_small.json", "fusion_small.md", "fusion_small.png"]
    rows = json.loads(paths[0].read_text())["arms"]
    assert [row["arm"] for row in rows] == [arm.name for arm in arms.ARMS] and "minus_plain" not in rows[0]
    assert rows[3]["minus_plain"][0] == pytest.approx(rows[3]["exact_match"] - rows[0]["exact_match"])
    lines = paths[1].read_text().splitlines()
    (plain,) = [line for line in lines if line.startswith("| plain LLaVA (")]
    assert "its tower never trains" in plain and f"| {rows[0]['exact_match']:.3f} |" in plain and "| 2,000 |" in plain
    assert len([line for line in lines if line.startswith("|")]) == 2 + 10
    assert all(line.count("|") == len(table.HEADER) + 1 for line in lines if line.startswith("|"))
    assert "of the last 2 steps" in paths[1].read_text()  # stage 1 has no more here
    assert paths[2].read_bytes()[:4] == b"\x89PNG"
