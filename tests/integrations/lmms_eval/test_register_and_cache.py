"""Our tasks in lmms-eval's index, and its response cache under patches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava_patch.core.errors import HostError
from llava_patch.core.paths import eval_tasks_dir
from llava_patch.integrations.lmms_eval import fail_fast, register

OURS = [
    "drift", "fusion_attention", "rprobe", "rprobe_ablation", "rprobe_masked", "rprobe_masked_nolang", "rprobe_nolang",
    "saturation",
]  # fmt: skip


def test_tasks_are_registered_once_and_only_with_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lmms_eval.tasks import TaskManager

    register.register_tasks()
    first = TaskManager.initialize_tasks
    assert register.entry_point() == [] and TaskManager.initialize_tasks is first
    # Indexing lmms-eval's own thousand YAML files takes seconds: give it none.
    real = TaskManager._get_task_and_group
    ours = str(eval_tasks_dir())
    monkeypatch.setattr(TaskManager, "_get_task_and_group", lambda self, f: real(self, f) if str(f) == ours else {})
    assert TaskManager().all_tasks == OURS
    assert TaskManager(include_defaults=False).all_tasks == []
    assert TaskManager(include_path=str(tmp_path)).all_tasks == OURS


def test_include_path_alone_finds_them_and_wins() -> None:
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(eval_tasks_dir()), include_defaults=False)
    assert manager.all_tasks == OURS and manager.all_groups == ["rprobe_ablation"]
    loaded = manager.load_task_or_group("rprobe_ablation")
    (members,) = loaded.values()
    assert sorted(members) == [name for name in OURS if name.startswith("rprobe") and name != "rprobe_ablation"]


class CountingLm:
    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, 0

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked += len(requests)
        return [self.answer] * len(requests)


def request() -> Any:
    from lmms_eval.api.instance import Instance

    metadata = {"task": "pope", "doc_id": 0, "repeats": 1}
    return Instance("generate_until", ("question", {"max_new_tokens": 4}), 0, metadata)


def test_answers_of_another_patch_are_not_served(tmp_path: Path) -> None:
    from lmms_eval.caching.response_cache import ResponseCache

    def run(patch_name: str, answer: str) -> tuple[str, int]:
        store = ResponseCache.create(str(tmp_path), model="llava", model_args="pretrained=x")
        if patch_name:
            fail_fast.mark_cache(store, patch_name)
            fail_fast.mark_cache(store, patch_name)  # twice is once
        lm = CountingLm(answer)
        (got,) = store.execute(lm, "generate_until", [request()])
        store.finalize(success=True)
        return got, lm.asked

    assert run("", "stock") == ("stock", 1)
    assert run("", "never asked") == ("stock", 0)
    assert run("aaaa", "patched") == ("patched", 1)
    assert run("bbbb", "other patch") == ("other patch", 1)
    assert run("aaaa", "never asked") == ("patched", 0)
    assert run("", "never asked") == ("stock", 0)


def test_an_unknown_cache_is_refused_rather_than_trusted() -> None:
    fail_fast.mark_cache(None, "aaaa")
    with pytest.raises(HostError, match="without --use_cache"):
        fail_fast.mark_cache(object(), "aaaa")
