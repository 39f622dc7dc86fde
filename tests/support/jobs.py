"""A pytest plugin: which tests fill which cell of the table of stacks, hosts and jobs that scripts/matrix.sh makes.

`pytest -p tests.support.jobs` runs these tests alone; with `--jobs-json FILE` it writes what became of each cell.
"""

import json
from pathlib import Path

import pytest

HOSTS = ("hf", "llava")
OF_THE_TEST = None  # the host is the test's own parameter

# Job: host: the tests, a file or a node's beginning each.
JOBS: dict[str, dict[str | None, list[str]]] = {
    "import, nothing configured": {
        "llava": ["tests/integrations/test_unconfigured.py::test_a_stock_script_loads_nothing_that_patches"],
    },
    "identities": {
        OF_THE_TEST: [
            "tests/routing/test_identities.py",
            "tests/routing/test_variants.py",
            "tests/routing/test_training.py",
            "tests/fusion/test_attach.py",
            "tests/patching/test_undo.py",
        ],
    },
    "generate": {OF_THE_TEST: ["tests/routing/test_cache.py", "tests/routing/test_conversations.py"]},
    "save, load": {
        OF_THE_TEST: [
            "tests/patching/test_checkpoint.py::test_a_new_process_gets_the_same_logits",
            "tests/fusion/test_checkpoints.py::test_a_fused_model_comes_back",
        ],
    },
    "train both stages": {
        "llava": [
            "tests/integrations/training/test_launch_scripts.py::test_both_stages_by_flags_environment_and_torchrun"
        ],
    },
    "resume": {"llava": ["tests/integrations/training/test_tower_training.py::test_trained_saved_and_resumed"]},
    "ZeRO-2, ZeRO-3": {
        "llava": ["tests/integrations/training/test_deepspeed.py::test_zero_2_and_zero_3_train_what_ddp_trains"],
    },
    "lmms-eval": {
        "hf": ["tests/integrations/lmms_eval/test_cli.py::test_our_tasks_beside_a_stock_one_on_a_patched_model"],
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--jobs-json", type=Path, help="file that gets what became of each cell")


def cell_of(item: pytest.Item) -> tuple[str, str] | None:
    """Job and host of a test; None: it fills no cell."""
    for job, hosts in JOBS.items():
        for host, beginnings in hosts.items():
            if item.nodeid.startswith(tuple(beginnings)):
                mine = host or next((v for v in _parameters(item) if v in HOSTS), None)
                return (job, mine) if mine else None
    return None


def _parameters(item: pytest.Item) -> list[object]:
    callspec = getattr(item, "callspec", None)
    return list(callspec.params.values()) if callspec else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others = [], []
    for item in items:
        cell = cell_of(item)
        (others if cell is None else chosen).append(item)
        if cell is not None:
            item.user_properties.append(("cell", cell))
    for beginning in [b for hosts in JOBS.values() for bs in hosts.values() for b in bs]:
        if not any(item.nodeid.startswith(beginning) for item in chosen):
            raise pytest.UsageError(f"tests/support/jobs.py: no test begins with {beginning}")
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


class _Cells:
    """What became of each cell's tests."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cells: dict[tuple[str, str], dict] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if "cell" not in properties or (report.when != "call" and report.passed):
            return
        new = {"passed": 0, "skipped": {}, "failed": {}, "seconds": 0.0, "figures": []}
        cell = self.cells.setdefault(tuple(properties["cell"]), new)
        cell["seconds"] = round(cell["seconds"] + report.duration, 2)
        if report.passed:
            cell["passed"] += 1
            cell["figures"] += [properties["figure"]] if "figure" in properties else []
        elif report.skipped:
            cell["skipped"][report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
        else:
            cell["failed"][report.nodeid] = str(report.longrepr).strip().splitlines()[-1]

    def pytest_sessionfinish(self) -> None:
        rows: dict[str, dict] = {job: {} for job in JOBS}
        for (job, host), cell in sorted(self.cells.items()):
            rows[job][host] = cell
        self.path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--jobs-json")
    if path is not None and not hasattr(config, "workerinput"):  # the process that collects the workers' reports
        config.pluginmanager.register(_Cells(path.absolute()))
