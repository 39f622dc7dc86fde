"""A pytest plugin: which tests fill which cell of the table of stacks, hosts and jobs that scripts/matrix.sh makes.

`pytest -p tests.support.jobs` runs these tests alone; with `--jobs-json FILE` it writes what became of each cell.
"""

import json
from pathlib import Path

import pytest

HOSTS = ("hf", "llava")
OF_THE_TEST = None  # the host is the test's own parameter

_OTHER_TRAINERS = (
    "tests/integrations/training/test_other_trainers.py::test_a_run_trains_what_it_should_goes_on_and_opens_again"
)
_HF_ZERO = "tests/integrations/training/test_hf_deepspeed.py"
_LLAVA_ZERO = "tests/integrations/training/test_deepspeed.py::test_zero_2_and_zero_3_train_what_ddp_trains"
_EACH_DECODER = [
    f"tests/routing/test_decoders.py::{test}[{{}}-"
    for test in (
        "test_a_silent_side_branch_is_stock",
        "test_what_leaves_nothing_out_is_stock",
        "test_every_variant_is_its_definition_and_its_own_cache",
        "test_lean_generation_reads_what_a_plain_forward_gives",
        "test_the_side_branch_learns_and_nothing_else",
    )
]
_NEXT = [  # the others there run on a stand-in too
    f"tests/hosts/test_llava_next.py::{test}"
    for test in (
        "test_its_siglip_ends_before_the_block_that_it_deletes",
        "test_projectors_that_a_fusion_cannot_start_in_are_refused",
        "test_other_towers_of_the_package_are_refused_by_name",
        "test_towers_that_join_layers_themselves_are_refused",
    )
]
_ENGINES = "tests/integrations/training/test_engines.py::test_two_ranks_train_what_one_process_trains"

# Job: host: the tests, a file or a node's beginning each.
JOBS: dict[str, dict[str | None, list[str]]] = {
    "import with nothing configured": {
        OF_THE_TEST: ["tests/integrations/test_unconfigured.py::test_a_stock_script_loads_nothing_that_patches"],
    },
    "identities": {
        OF_THE_TEST: [
            "tests/routing/test_identities.py",
            "tests/routing/test_variants.py",
            "tests/routing/test_training.py",
            "tests/fusion/test_attach.py",
            "tests/patching/test_undo.py",
        ],
        "llava": ["tests/hosts/test_llava_next.py"],
    },
    "generate": {OF_THE_TEST: ["tests/routing/test_cache.py"]},
    "save and load": {
        OF_THE_TEST: [
            "tests/patching/test_checkpoint.py::test_a_new_process_gets_the_same_logits",
            "tests/fusion/test_checkpoints.py::test_a_fused_model_comes_back",
        ],
    },
    "train both stages": {
        "hf": [_OTHER_TRAINERS],
        "llava": [
            "tests/integrations/training/test_launch_scripts.py::test_both_stages_by_flags_environment_and_torchrun"
        ],
    },
    "resume": {
        "hf": [_OTHER_TRAINERS],
        "llava": [
            "tests/integrations/training/test_tower_training.py::test_trained_saved_and_resumed",
            "tests/integrations/training/test_resume.py",
        ],
    },
    "ZeRO-2": {"hf": [_HF_ZERO], "llava": [_LLAVA_ZERO]},
    "ZeRO-3": {"hf": [_HF_ZERO], "llava": [_LLAVA_ZERO]},
    "FSDP": {"hf": [f"{_ENGINES}[hf:fsdp:skip]"], "llava": [f"{_ENGINES}[llava:fsdp:kv]"]},
    "FSDP2": {"hf": [f"{_ENGINES}[hf:fsdp2:skip]"], "llava": [f"{_ENGINES}[llava:fsdp2:kv]"]},
    "HF LLaVA-NeXT": {"hf": [test.format("next") for test in _EACH_DECODER]},
    "HF LLaVA-OneVision": {"hf": [test.format("onevision") for test in _EACH_DECODER]},
    "LLaVA-NeXT's package": {"llava": [*_NEXT, "tests/integrations/training/test_llava_next_runs.py"]},
    "LLaVA's own evaluation": {"llava": ["tests/integrations/test_entry_points.py"]},
    "lmms-eval": {
        OF_THE_TEST: ["tests/integrations/lmms_eval/test_cli.py::test_our_tasks_beside_a_stock_one_on_a_patched_model"],
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--jobs", default=",".join(JOBS), help="which of them, with commas between; default: all")
    parser.addoption("--jobs-json", type=Path, help="file that gets what became of each cell")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that no job names: some import what an older transformers has not."""
    named = {
        config.rootpath / test.partition("::")[0]
        for hosts in JOBS.values()
        for tests in hosts.values()
        for test in tests
    }
    return True if collection_path.name.startswith("test_") and collection_path not in named else None


def cells_of(item: pytest.Item) -> list[tuple[str, str]]:
    """Jobs with the host of a test, which may show several."""
    own = next((v for v in _parameters(item) if v in HOSTS), None)
    return [
        (job, mine)
        for job, hosts in JOBS.items()
        for host, beginnings in hosts.items()
        if item.nodeid.startswith(tuple(beginnings)) and (mine := host or own)
    ]


def _parameters(item: pytest.Item) -> list[object]:
    callspec = getattr(item, "callspec", None)
    return list(callspec.params.values()) if callspec else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, others, asked = [], [], config.getoption("--jobs").split(",")
    if unknown := set(asked) - set(JOBS):
        raise pytest.UsageError(f"--jobs: there is no {', '.join(sorted(unknown))}, only {', '.join(JOBS)}")
    for item in items:
        cells = [cell for cell in cells_of(item) if cell[0] in asked]
        (chosen if cells else others).append(item)
        item.user_properties.append(("cells", cells))
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and len(asked) == len(JOBS)
    for beginning in [b for hosts in JOBS.values() for bs in hosts.values() for b in bs]:
        if everything and not any(item.nodeid.startswith(beginning) for item in chosen):
            raise pytest.UsageError(f"tests/support/jobs.py: no test begins with {beginning}")
    config.hook.pytest_deselected(items=others)
    items[:] = chosen


class _Cells:
    """What became of each cell's tests."""

    def __init__(self, path: Path, jobs: list[str]) -> None:
        self.path, self.jobs = path, jobs
        self.cells: dict[tuple[str, str], dict] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            for cell in dict(report.user_properties)["cells"]:
                self._add(report, tuple(cell))

    def _add(self, report: pytest.TestReport, name: tuple[str, str]) -> None:
        new = {"passed": 0, "skipped": {}, "failed": {}, "seconds": 0.0, "figures": []}
        cell, properties = self.cells.setdefault(name, new), dict(report.user_properties)
        cell["seconds"] = round(cell["seconds"] + report.duration, 2)
        if report.passed:
            cell["passed"] += 1
            cell["figures"] += [properties["figure"]] if "figure" in properties else []
        elif report.skipped:
            cell["skipped"][report.nodeid] = report.longrepr[2].removeprefix("Skipped: ")
        else:
            cell["failed"][report.nodeid] = str(report.longrepr).strip().splitlines()[-1]

    def pytest_sessionfinish(self) -> None:
        rows: dict[str, dict] = {job: {} for job in self.jobs}
        for (job, host), cell in sorted(self.cells.items()):
            rows[job][host] = cell
        self.path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--jobs-json")
    if path is not None and not hasattr(config, "workerinput"):  # the process that collects the workers' reports
        config.pluginmanager.register(_Cells(path.absolute(), config.getoption("--jobs").split(",")))
