"""The report of what was found: one table of claims, then each study with its figures; HTML and Markdown."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llava_patch.core.extras import optional
from llava_patch.core.files import write_text
from llava_patch.core.plotting import write_figure
from llava_patch.core.terminal import markdown
from llava_patch.tools.evidence import study
from llava_patch.tools.evidence.findings import FAILS, HOLDS, UNDECIDED, Effect, Finding, Missing
from llava_patch.tools.evidence.study import Study

PAGE, TEXT, FIGURES, TEMPLATE = "evidence.html", "evidence.md", "figures", "evidence.html.j2"
ORDER = (HOLDS, FAILS, UNDECIDED)


@dataclass(frozen=True)
class Section:
    """A study as the report shows it; `lacking` says which of its runs are not there."""

    study: Study
    findings: list[Finding]
    seconds: float
    lacking: str


def sections(values: Mapping[str, Any]) -> list[Section]:
    """What the results of `evidence.json` say, study by study."""
    found = []
    for one in map(study.read, study.STUDIES):
        seconds = sum(sum(values["runs"][name]["seconds"]) for name in one.runs if name in values["runs"])
        results = results_of(one, values)
        lacking = [name for name in one.runs if len(values["runs"].get(name, {"seeds": ()})["seeds"]) < values["seeds"]]
        said = "" if not lacking else f"not whole: {', '.join(lacking)}"
        try:
            said_of = one.findings(results)
        except Missing:
            said_of = []
        found.append(Section(one, said_of, seconds, said))
    return found


def results_of(one: Study, values: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of all runs, of those seeds alone that every run of the study has (one may have been broken off)."""
    runs = values["runs"]
    needed = {before for run in one.runs.values() for before in run.needs}
    own = [set(runs[name]["seeds"]) for name in runs if name in one.runs or name in needed]
    common = set.intersection(*own) if own else set()
    return {
        name: [result for seed, result in zip(run["seeds"], run["results"], strict=True) if seed in common]
        for name, run in runs.items()
        if common <= set(run["seeds"])
    }


def shown(effect: Effect) -> str:
    """A figure with its interval."""
    return f"{effect.value:+.3g} ({effect.low:+.3g} to {effect.high:+.3g})"


def summary(every: list[Section]) -> tuple[list[str], list[list[str]]]:
    """The table of all claims: head and lines."""
    lines = [
        [finding.verdict, finding.claim, "; ".join(map(shown, finding.effect)), finding.source]
        for section in every
        for finding in section.findings
    ]
    return ["verdict", "claim", "effect by seed (95 % interval)", "source"], lines


def counts(every: list[Section]) -> str:
    """How many claims came out how, in words."""
    verdicts = [finding.verdict for section in every for finding in section.findings]
    return ", ".join(f"{verdicts.count(name)} {name}" for name in ORDER)


def first_screen(every: list[Section]) -> str:
    """The table for a README: the findings that have a short form."""
    lines = [
        [finding.short, finding.verdict, "; ".join(f"{one.value:+.3g}" for one in finding.effect)]
        for section in every
        for finding in section.findings
        if finding.short
    ]
    return markdown(["claim", "on small models", "effect by seed"], lines)


def text(values: Mapping[str, Any], every: list[Section], pictures: Mapping[str, list[str]]) -> str:
    """The whole report in Markdown; `pictures` are the figures' paths by study."""
    packages = ", ".join(f"{name} {found}" for name, found in values["versions"].items())
    seconds = sum(section.seconds for section in every)
    parts = [
        "# Which of the papers' claims hold on small models",
        f"By `llava-patch evidence`, tier {values['size']}, {values['seeds']} seeds: {counts(every)}. "
        f"{seconds / 60:.0f} minutes of one core on {values['machine']}, {values['date']}; {packages}.",
        RULE,
        markdown(*summary(every)),
    ]
    for section in every:
        parts += [f"## {section.study.title}", section.study.about]
        if section.lacking:
            parts.append(section.lacking[0].upper() + section.lacking[1:] + ".")
        parts += [f"![{section.study.title}]({path})" for path in pictures.get(section.study.name, ())]
        parts += [_entry(finding) for finding in section.findings]
        parts.append(f"{section.seconds / 60:.1f} minutes of one core.")
    return "\n\n".join(parts) + "\n"


RULE = (
    'A claim says that an effect is greater than zero (or than the least that counts). It "holds" where the 95 % '
    'interval of every seed lies above, it "does not hold" where every one lies below; otherwise, and wherever its '
    "control did not come out as it must, it is undecided. A seed draws weights, training samples and held-out samples "
    "anew."
)


def _entry(finding: Finding) -> str:
    """One claim in full."""
    verdict = finding.verdict + (f" ({finding.why})" if finding.why else "")
    lines = [
        f"**{finding.claim}** *{verdict}*",
        "",
        f"- {finding.source}. {finding.measured}: {'; '.join(map(shown, finding.effect)) or 'nothing'}"
        + (f"; the least that counts is {finding.least:g}" if finding.least else "")
        + ".",
        f"- Control: {finding.control} ({'passed' if finding.passed else 'failed'}).",
    ]
    if finding.values:
        listed = (f"{name} {', '.join(f'{value:.4g}' for value in row)}" for name, row in finding.values.items())
        lines.append(f"- By seed: {'; '.join(listed)}.")
    if finding.note:
        lines.append(f"- {finding.note}")
    return "\n".join(lines)


def figures_of(one: Study, values: Mapping[str, Any]) -> dict[str, Any]:
    """A study's figures by name; none where a run that they need is not there."""
    try:
        return one.figures(results_of(one, values))
    except Missing:
        return {}


def write(values: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the page, the text and the figures; returns their paths, the page first."""
    every = sections(values)
    pictures: dict[str, list[str]] = {}
    inline: dict[str, list[str]] = {}
    written = []
    for section in every:
        for name, figure in figures_of(section.study, values).items():
            path = folder / FIGURES / f"{section.study.name}_{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(write_figure(figure, path))
            pictures.setdefault(section.study.name, []).append(f"{FIGURES}/{path.name}")
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=130)
            inline.setdefault(section.study.name, []).append(base64.b64encode(drawn.getvalue()).decode("ascii"))
    page = _html(values, every, inline)
    return [write_text(folder / PAGE, page), write_text(folder / TEXT, text(values, every, pictures)), *written]


def _html(values: Mapping[str, Any], every: list[Section], pictures: Mapping[str, list[str]]) -> str:
    jinja2 = optional("jinja2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = (resources.files("llava_patch.tools.evidence") / TEMPLATE).read_text(encoding="utf-8")
    classes = {HOLDS: "holds", FAILS: "fails", UNDECIDED: "open"}
    page: str = environment.from_string(source).render(
        values=values, sections=every, pictures=pictures, shown=shown, counts=counts(every), rule=RULE, classes=classes
    )
    return page
