"""What was found, by environment: canary.json is kept up to date, canary.md is its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canary.environments import SHOWN
from canary.steps import OK

TITLE = """# What works with what

Written by `bash scripts/canary.sh` (see CONTRIBUTING.md), which makes each environment anew and throws it away.
`newest` and `oldest`: of everything within the ranges of pyproject.toml, its extras `all`, `eval` and `hosts`, beside
llava-torch and lmms-eval. `llava-pinned`: what LLaVA's own pyproject.toml pins, where `pip install` of llava_patch must
change nothing and LLaVA's training must stay what it is.
"""


def update(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Put one environment's findings in place of its older ones, and write both files."""
    path = folder / "canary.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"format": 1, "environments": {}}
    values["environments"][name] = found
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (folder / "canary.md").write_text(markdown(values), encoding="utf-8")


def markdown(values: dict[str, Any]) -> str:
    """The table: a column an environment; what failed is said below it."""
    environments = values["environments"]
    lines = [f"| | {' | '.join(environments)} |", "|---" * (len(environments) + 1) + "|"]

    def row(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    for title in ("date", "llava_patch", "python", "machine"):
        row(title, [found[title] for found in environments.values()])
    for package in SHOWN:
        row(package, [found["versions"].get(package, "") for found in environments.values()])
    states = {name: {s["step"]: s["state"] for s in found["steps"]} for name, found in environments.items()}
    for step in dict.fromkeys(step for of in states.values() for step in of):
        cells = [of.get(step, "") for of in states.values()]
        row(f"**{step}**", [cell if cell in ("", OK) else f"**{cell}**" for cell in cells])
    said = [
        f"- {name}, {step['step']}: {'' if step['state'] == OK else step['state'] + ': '}{step['said']}"
        for name, found in environments.items()
        for step in found["steps"]
        if step["said"]
    ]
    return "\n".join([TITLE, *lines, "", *said]).rstrip() + "\n"
