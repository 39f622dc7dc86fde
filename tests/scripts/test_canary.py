"""The canary: a failure stops nothing, is written down, and shows in the exit status."""

import json
import subprocess
import sys

import pytest
from canary import environments, record, run
from canary.smoke import STEPS
from canary.steps import FAILED, OK, SKIPPED, CommandError, Steps, last_line

VERSIONS = {"torch": "2.0", "numpy": "1.0", "unheard-of": "3"}


class Fake(environments.Environment):
    """One in which commands print what the test says, and nothing is installed."""

    said, fails = "", False

    def make(self):
        pass

    def versions(self):
        return {**VERSIONS, "llava-patch": "0.1.0"}

    def run(self, *words, **env):
        code = f"print({self.said!r})" + ("; raise SystemExit('it died\\n')" if self.fails else "")
        return self.steps.command([sys.executable, "-c", code], self.folder, {})


@pytest.fixture
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "Environment", Fake)

    def go(kind, *words):
        monkeypatch.setattr(run, "KINDS", {"newest": kind, "oldest": lambda one: one.steps.run("all", lambda: None)})
        monkeypatch.setattr(sys, "argv", ["canary", *words, "--output", str(tmp_path)])
        with pytest.raises(SystemExit) as ended:
            run.main()
        return ended.value.code, json.loads((tmp_path / "canary.json").read_text())["environments"]

    return go


def _breaks(environment):
    environment.steps.run("first", lambda: 1 / 0)
    environment.steps.run("second", lambda: f"found {environment.folder}/env")


def test_a_failed_step_stops_nothing_and_shows_in_the_exit_status(fake, tmp_path):
    code, found = fake(_breaks)
    assert code == 1 and set(found) == {"newest", "oldest"}
    rows = [(row["step"], row["state"], row["said"]) for row in found["newest"]["steps"]]
    assert rows == [("first", FAILED, "ZeroDivisionError: division by zero"), ("second", OK, "found env")]
    assert found["newest"]["versions"] == {"torch": "2.0", "numpy": "1.0"} and found["newest"]["llava_patch"] == "0.1.0"
    table = (tmp_path / "canary.md").read_text()
    assert (
        "| | newest | oldest |" in table and "| **first** | **failed** |  |" in table and "| **all** |  | ok |" in table
    )
    assert "- newest, first: failed: ZeroDivisionError: division by zero" in table


def test_one_environment_leaves_the_others_findings(fake):
    fake(_breaks)
    code, found = fake(_breaks, "oldest")
    assert code == 0 and [row["state"] for row in found["newest"]["steps"]] == [FAILED, OK]


def test_an_unknown_environment_is_an_error(fake, capsys):
    with pytest.raises(FileNotFoundError):  # nothing is written
        fake(_breaks, "newset")
    assert "no environment is called newset: there are newest, oldest" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_a_hosts_steps_are_told_apart(fails, tmp_path):
    environment = Fake("newest", tmp_path, Steps(tmp_path / "log.txt"))
    lines = [{"step": "stock", "error": None}, {"step": "patch", "error": "HostError: no\nmore"}]
    environment.said, environment.fails = "\n".join(map(json.dumps, lines if fails else [])), True
    run._smoke(environment, "hf")
    states = [row["state"] for row in environment.steps.rows]
    assert [row["step"] for row in environment.steps.rows] == [f"hf: {name}" for name in STEPS]
    if fails:
        assert states == [OK, FAILED] + [SKIPPED] * 4 and environment.steps.rows[1]["said"] == "HostError: no"
    else:
        assert states == [FAILED] + [SKIPPED] * 5 and environment.steps.rows[0]["said"] == "it died"


def test_a_command_fails_with_its_last_line_and_the_log_has_all(tmp_path):
    steps = Steps(tmp_path / "log.txt")
    with pytest.raises(CommandError, match=r"^Boom: it broke$"):
        steps.command(
            ["bash", "-c", "echo much; echo 'Boom: it broke' >&2; exit 3"], tmp_path, {"PATH": "/usr/bin:/bin"}
        )
    assert "much\nBoom: it broke" in (tmp_path / "log.txt").read_text()
    assert last_line("a\n  b  \n ----\n") == "b" and last_line("") == ""
    assert last_line("x\n  0%|  | 0/3 [00:04<?, ?it/s]\n") == "x"
    assert last_line("Traceback\nValueError: no\n\nwandb: done\n") == "ValueError: no"


def test_only_packages_of_torchs_gpu_builds_are_left_to_torch():
    names = ["nvidia-cublas", "nvidia-nccl-cu13", "cuda-toolkit", "triton", "nvidia-ml-py", "torch", "tritonclient"]
    assert [name for name in names if environments.gpu(f"{name}==1.0")] == names[:4]


def test_the_command_needs_the_standard_library_alone():
    code = "import sys; sys.path.insert(0, 'scripts'); import canary.run; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=environments.ROOT)
    assert done.stdout.strip() == "False", done.stderr


def test_the_table_is_what_the_json_says():
    folder = environments.ROOT / "docs" / "measured"
    values = json.loads((folder / "canary.json").read_text())
    assert set(values["environments"]) == set(run.KINDS)
    assert (folder / "canary.md").read_text() == record.markdown(values)
