"""docs/measured/matrix.json, kept up to date a stack at a time, and its table in matrix.md and README.md."""

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "measured" / "matrix.json"
SHOWN = ("transformers", "torch", "accelerate", "peft", "trl", "deepspeed", "lmms-eval", "llava-torch", "numpy")
BEGIN, END = "<!-- by scripts/matrix.sh -->", "<!-- end -->"
HOSTS = ("hf", "llava")
TREES = (("llava_patch", "llava_patch"), ("LLaVA", "llava"))
SAY = (
    "import json, platform, importlib.metadata as m\n"
    "def of(name):\n"
    "    try: return m.version(name)\n"
    "    except m.PackageNotFoundError: return None\n"
    "print(json.dumps({'python': platform.python_version(), **{n: of(n) for n in %r}}))"
)


def versions(environment: dict[str, str]) -> dict[str, str]:
    """What is installed in an environment."""
    said = subprocess.run(
        ["python", "-c", SAY % (SHOWN,)], env=environment, check=True, capture_output=True, text=True, cwd="/"
    )
    return {name: version for name, version in json.loads(said.stdout.splitlines()[-1]).items() if version}


def column(found: dict[str, str], tree: str, filled: dict[str, Any]) -> dict[str, Any]:
    """What became of a stack's jobs, where and when."""
    about = {"date": _today(), "machine": f"{platform.system()} {platform.machine()}", "versions": found}
    trees = {"llava_patch": revision(ROOT, ":!docs/measured", ":!README.md"), "llava": tree}  # which the table is in
    return {**about, **{name: at for name, at in trees.items() if at}, "cells": filled}


def revision(tree: str | Path, *paths: str) -> str:
    """The git revision of a checkout, and whether tracked files (of these paths) differ from it; "" for no checkout."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True).stdout.strip()

    found = git("rev-parse", "--short=12", "HEAD")
    return found + (", changed" if git("status", "--porcelain", "--untracked-files=no", "--", ".", *paths) else "")


def add(stack: str, new: dict[str, Any]) -> None:
    """Put a stack's column in place of its older one."""
    values = _read()
    values["stacks"][stack] = new
    _write(values)


def add_exchange(rows: dict[str, Any]) -> None:
    """Put what became of exchanged checkpoints in place of the older rows."""
    values = _read()
    values["exchange"] = {"date": _today(), "rows": rows}
    _write(values)


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _read() -> dict[str, Any]:
    if FILE.exists():
        return json.loads(FILE.read_text(encoding="utf-8"))
    return {"format": 1, "stacks": {}, "exchange": {}}


def _age(stack: tuple[str, dict[str, Any]]) -> tuple[list[int], str]:
    name, about = stack
    return [int(part) for part in about["versions"]["transformers"].split(".")], name


def _write(values: dict[str, Any]) -> None:
    values["stacks"] = dict(sorted(values["stacks"].items(), key=_age))
    values = json.loads(json.dumps(values).replace(f"{ROOT}/", ""))  # where the checkout lies says nothing
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (FILE.parent / "matrix.md").write_text(markdown(values), encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if BEGIN in text:
        before, rest = text.split(BEGIN, 1)
        after = rest.split(END, 1)[1]
        readme.write_text(f"{before}{BEGIN}\n{cells(values)}\n{END}{after}", encoding="utf-8")


def cells(values: dict[str, Any]) -> str:
    """A row a job, a column a stack; in a cell what passed on HF and on llava."""
    stacks = values["stacks"]
    lines = ["| passed: HF, `llava` | " + " | ".join(_title(name, stack) for name, stack in stacks.items()) + " |"]
    lines.append("|---" * (len(stacks) + 1) + "|")
    jobs = list(dict.fromkeys(job for stack in stacks.values() for job in stack["cells"]))
    for job in jobs:
        row = [", ".join(_cell(stack["cells"].get(job, {}).get(host)) for host in HOSTS) for stack in stacks.values()]
        lines.append(f"| {job} | {' | '.join(row)} |")
    return "\n".join(lines)


def _title(name: str, stack: dict[str, Any]) -> str:
    return f"{name}<br>{stack['versions']['transformers']}"


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None or not (cell["passed"] or cell["failed"] or cell["skipped"]):
        return "-"
    if cell["failed"]:
        return f"**{len(cell['failed'])} of {cell['passed'] + len(cell['failed'])} fail**"
    return str(cell["passed"]) if cell["passed"] else "skipped"


def markdown(values: dict[str, Any]) -> str:
    """The table, what each cell left out and why, versions, and exchanged checkpoints."""
    lines = [
        "# Stacks, hosts and jobs", "",
        "Written by `bash scripts/matrix.sh`, which runs the tests that `tests/support/jobs.py` lists in every stack's "
        "environment. A figure is the number of tests that passed; a test may show several jobs. Training on HF is "
        "that of transformers' Trainer and of TRL, which know no stages.", "", cells(values), "",
    ]  # fmt: skip
    for name, stack in values["stacks"].items():
        installed = ", ".join(f"{package} {version}" for package, version in stack["versions"].items())
        trees = (f"; {name} at {stack[key]}" for name, key in TREES if key in stack)
        lines += [f"## {name}", "", f"{stack['date']}, {stack['machine']}: {installed}{''.join(trees)}", ""]
        for job, hosts in stack["cells"].items():
            for host, cell in hosts.items():
                figures = f": {'; '.join(cell['figures'])}" if cell["figures"] else ""
                lines.append(f"- {job}, {host}: {cell['passed']} passed in {cell['seconds']:.0f} s{figures}")
                for state in ("failed", "skipped"):
                    for reason in dict.fromkeys(cell[state].values()):
                        times = list(cell[state].values()).count(reason)
                        lines.append(f"    - {state} ({times}): {reason}")
        lines.append("")
    if values.get("exchange"):
        lines += [f"## Checkpoints written on one stack, opened on another ({values['exchange']['date']})", ""]
        lines += ["| written -> opened | checkpoint | logits differ by at most (of) |", "|---|---|---|"]
        for pair, rows in values["exchange"]["rows"].items():
            for checkpoint, row in rows.items():
                said = row.get("refused") or f"{row['far']:.2g} ({row['of']:.2g})"
                lines.append(f"| {pair} | {checkpoint} | {said} |")
    return "\n".join(lines).rstrip() + "\n"
