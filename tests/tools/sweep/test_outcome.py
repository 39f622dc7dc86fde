"""The final loss and lmms-eval's metrics, read from files as their programs write them."""

import json
import math

import pytest

from llava_patch.core.errors import RunError
from llava_patch.tools.sweep.record import FinalLoss, final_loss, metrics, trainer_state


def _state(folder, entries):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": entries}))
    return path


def test_the_last_fifty_steps_alone_count(tmp_path):
    entries = [{"step": i, "loss": 9.0 if i <= 20 else float(i)} for i in range(1, 71)]
    path = _state(tmp_path, [*entries, {"step": 70, "train_loss": 5.0}])
    assert final_loss(path) == FinalLoss(sum(range(21, 71)) / 50, 50, 70)


def test_sparse_logging_is_weighted_by_steps(tmp_path):
    # Entries cover steps 1-40, 41-60 and 61-70: the last 50 hold 20 steps of the first.
    path = _state(tmp_path, [{"step": 40, "loss": 4.0}, {"step": 60, "loss": 2.0}, {"step": 70, "loss": 1.0}])
    assert final_loss(path) == FinalLoss((20 * 4.0 + 20 * 2.0 + 10 * 1.0) / 50, 50, 70)


def test_a_short_run_says_how_many_steps_it_has(tmp_path):
    assert final_loss(_state(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}])) == FinalLoss(1.5, 2, 2)


def test_no_logged_loss_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no training loss"):
        final_loss(_state(tmp_path, [{"step": 1, "eval_loss": 1.0}]))


def test_the_state_is_found_in_the_run_or_its_latest_checkpoint(tmp_path):
    with pytest.raises(RunError, match="--output_dir"):
        trainer_state(tmp_path)
    _state(tmp_path / "checkpoint-9", [])
    latest = _state(tmp_path / "checkpoint-10", [])
    assert trainer_state(tmp_path) == latest
    own = _state(tmp_path, [])
    assert trainer_state(tmp_path) == own


def test_a_checkpoint_of_a_training_that_broke_off_is_no_end(tmp_path):
    path = _state(tmp_path / "checkpoint-5", [{"step": 5, "loss": 1.0}])
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "global_step": 5, "max_steps": 9}))
    with pytest.raises(RunError, match="broke off at step 5 of 9"):
        trainer_state(tmp_path)
    path.write_text(json.dumps({**state, "global_step": 9, "max_steps": 9}))
    assert trainer_state(tmp_path) == path


def test_files_that_cannot_be_read_are_an_error(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(RunError, match=r"trainer_state\.json: not valid JSON .*the command ended well"):
        trainer_state(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(RunError, match="no training loss"):
        final_loss(tmp_path / "trainer_state.json")
    (tmp_path / "1_results.json").write_text("{")
    with pytest.raises(RunError, match=r"results\.json: not valid JSON"):
        metrics(tmp_path)
    (tmp_path / "1_results.json").write_text("{}")
    with pytest.raises(RunError, match="left no metric"):
        metrics(tmp_path)


@pytest.mark.parametrize("history", ["x", [1], [{"loss": 1.0}], [{"step": 1, "loss": "x"}], [{"step": 1, "loss": None}],
                                     [{"step": 1, "loss": 10**400}]])  # fmt: skip
def test_a_log_of_another_kind_is_an_error(history, tmp_path):
    with pytest.raises(RunError, match=r"trainer_state\.json"):
        final_loss(_state(tmp_path, history))


def test_losses_of_a_run_that_diverged(tmp_path):
    infinite = _state(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": math.inf}])
    assert final_loss(infinite).mean == math.inf
    assert math.isnan(final_loss(_state(tmp_path, [{"step": 1, "loss": math.nan}])).mean)


@pytest.mark.parametrize("results", [[], {"pope": 1}, {"pope": {"acc,none": 10**400}}])
def test_results_of_another_kind_are_an_error(results, tmp_path):
    (tmp_path / "1_results.json").write_text(json.dumps({"results": results}))
    with pytest.raises(RunError, match=r"1_results\.json"):
        metrics(tmp_path)


def test_metrics_as_lmms_eval_writes_them(tmp_path):
    folder = tmp_path / "name"
    folder.mkdir()
    values = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "acc_stderr_clt,none": 0.1,
        "f1,strict": 1,
        "submission,none": None,
        "b": True,
    }
    (folder / "1_results.json").write_text(json.dumps({"results": {"pope": values}}))
    assert metrics(tmp_path) == {"pope/acc": 0.5, "pope/f1 (strict)": 1.0}
    with pytest.raises(RunError, match=r"no \*results.json"):
        metrics(tmp_path, frozenset([folder / "1_results.json"]))
