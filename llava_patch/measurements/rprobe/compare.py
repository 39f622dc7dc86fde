"""Several R-Probe results side by side: one table, one figure, and what keeps them from being compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_patch.core import files
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.extras import optional
from llava_patch.core.terminal import counted, markdown
from llava_patch.data.readers.read import resolve_source
from llava_patch.measurements.base import FIGURES, Comparison, Table
from llava_patch.measurements.rprobe.bootstrap import interval, paired, unlike
from llava_patch.measurements.rprobe.figures import draw_curves, draw_intervals, plain_name, save
from llava_patch.measurements.rprobe.output import RESULT
from llava_patch.measurements.rprobe.result import RProbeResult

# Settings and facts that change what is measured; the others (pictures, store, resamples) do not.
SETTINGS = (
    "steps", "batch_size", "lr", "weight_decay", "warmup", "clip", "train_pages", "heldout_pages", "heldout_share",
    "seed", "rope", "image_mode", "text_height", "page", "threshold", "masked", "text", "max_text_tokens",
    "boxes_per_sample", "trained",
)  # fmt: skip
FACTS = (
    "data", "source", "heldout_source", "learning_rate",
    "decoder_layers", "image_tokens", "pixels_per_token", "train_samples", "heldout_samples",
    "skipped_by_reader", "skipped_train", "skipped_heldout", "unread",
)  # fmt: skip
HEAD = (
    "result", "documents", "held-out MSE [95 %]", "FVU", "PSNR dB", "MSE in text", "beside text",
    "steps to MSE < {threshold}", "to FVU < 0.5", "MSE minus {baseline} [paired 95 %]",
)  # fmt: skip
_SHOWN = (
    "fvu", "psnr", "constant_mse", "steps_to_threshold", "threshold", "threshold_is_vacuous", "steps_to_half_fvu",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One result of a comparison.

    `interval` is that of its MSE (None: fewer than 2 documents); `difference` is (MSE minus the baseline's, low, high),
    None for the baseline itself and where `unlike` says how the held-out samples differ.
    """

    name: str
    result: RProbeResult
    interval: tuple[float, float] | None
    difference: tuple[float, float | None, float | None] | None
    unlike: str | None

    def numbers(self) -> dict[str, Any]:
        """As JSON values."""
        parts = {"inside": self.result.inside, "outside": self.result.outside}
        return {
            "mse": self.result.mse,
            "mse_interval": self.interval,
            "difference": self.difference and self.difference[0],
            "difference_interval": self.difference and self.difference[1:],
            "unlike": self.unlike,
            **{key: getattr(self.result, key) for key in _SHOWN},
            **{f"{where}_mse": None if part is None else part.mse for where, part in parts.items()},
        }

    def cells(self, baseline: str) -> list[str]:
        """As text, under `HEAD`."""
        one = self.result
        steps, half = ("never" if n is None else str(n) for n in (one.steps_to_threshold, one.steps_to_half_fvu))
        apart = "baseline" if self.name == baseline else "not paired"
        if self.difference is not None:
            apart = f"{self.difference[0]:+.4f}{_between(self.difference[1:], '+')}"
        return [
            self.name,
            str(len({sample["document"] for sample in one.documents})),
            f"{one.mse:.4f}{_between(self.interval)}",
            f"{one.fvu:.3f}",
            f"{one.psnr:.1f}",
            *("-" if part is None else f"{part.mse:.4f}" for part in (one.inside, one.outside)),
            f"({steps})" if one.threshold_is_vacuous else steps,
            half,
            apart,
        ]


def _between(limits: tuple[float | None, float | None] | None, sign: str = "") -> str:
    """An interval behind its value."""
    low, high = limits or (None, None)
    return " [no interval]" if low is None or high is None else f" [{low:{sign}.4f}, {high:{sign}.4f}]"


def find_results(path: Path) -> dict[str, Path]:
    """The result files that a path names, by their folders' names (relative to the path where there are several).

    A path is a result file, or a folder that holds `rprobe.json` in itself or anywhere below (lmms-eval's output).
    """
    name = path.resolve().name
    if path.is_file():
        return {(path.resolve().parent.name if path.name == RESULT else path.stem): path}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    below = [path / RESULT] if (path / RESULT).is_file() else sorted(path.rglob(RESULT))
    if not below:
        raise InputError(f"{path}: holds no {RESULT}, in itself or below")
    return {f"{name}/{file.parent.relative_to(path)}" if len(below) > 1 else name: file for file in below}


def load(paths: Sequence[Path], names: Sequence[str] = ()) -> dict[str, RProbeResult]:
    """Results by name, in order; without names they are called by their folders, numbered where those are alike."""
    found = [(name, file) for path in paths for name, file in find_results(path).items()]
    if names and len(names) != len(found):
        there = ", ".join(str(file) for _, file in found)
        raise SettingError(f"--names: {counted(len(names), 'name')} for {counted(len(found), 'result')} ({there})")
    if len(set(names)) < len(names):
        raise SettingError(f"--names {','.join(names)}: expected distinct names")
    labels = [name for name, _ in found]
    if len({label.split("/")[0] for label in labels}) == 1 and all("/" in label for label in labels):
        labels = [label.split("/", 1)[1] for label in labels]  # all of one folder
    return {name: RProbeResult.load(file) for name, (_, file) in zip(names or numbered(labels), found, strict=True)}


def numbered(names: Sequence[str]) -> list[str]:
    """Names by which things can be told apart: those that are alike get the number of their place."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


@dataclass(frozen=True)
class ProbeComparison(Comparison):
    """R-Probe results beside a baseline; `lines` are the table's rows with their numbers."""

    lines: Sequence[Row] = ()
    baseline: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the table, by the results' names."""
        results = {line.name: line.numbers() for line in self.lines}
        return {**self.asked, "baseline": self.baseline, "results": results, "notes": list(self.notes)}

    def save(self, folder: str | Path, name: str = "compare", formats: Sequence[str] = FIGURES[:1]) -> tuple[Path, ...]:
        """Write NAME.md, NAME.json and the figure of all curves, each whole or not at all; returns the paths."""
        folder = Path(folder)
        paths = [
            files.write_text(folder / f"{name}.md", markdown_page(self.head, self.rows, self.notes, self.title)),
            files.write_json(folder / f"{name}.json", self.to_dict()),
        ]
        return (*paths, *(save(_figure(self), folder / f"{name}.{suffix}") for suffix in formats))

    def narrow(self) -> list[Table]:
        """Two tables that fit a terminal: errors with their intervals, and the rest."""
        threshold = next(f"{line.result.threshold:g}" for line in self.lines if line.name == self.baseline)
        errors = []
        for row in self.rows:
            (mse, _, spread), (apart, bracket, paired_spread) = (row[i].partition(" [") for i in (2, -1))
            errors.append([row[0], mse, f"[{spread}", apart, bracket[1:] + paired_spread])
        return [
            (["result", "MSE", "95 %", "minus base", "paired 95 %"], errors),
            (
                ["result", "docs", "FVU", "PSNR", "in text", "beside", f"to {threshold}", "FVU .5"],
                [[*row[:2], *row[3:-1]] for row in self.rows],
            ),
        ]


def compare_probes(
    results: Mapping[str, RProbeResult], baseline: str = "", resamples: int = 2000, seed: int = 0
) -> ProbeComparison:
    """One table with intervals, one figure, and what keeps results from being compared with the baseline.

    Args:
        results: R-Probe results by the name that the table gives them.
        baseline: the name of the one that the others are compared with; "": the first.
        resamples: bootstrap resamples behind an interval, of held-out documents.
        seed: of the bootstrap.

    Returns:
        The comparison; a row whose documents are not the baseline's has no difference and says why.

    Raises:
        SettingError: `baseline` is none of the names.
    """
    baseline = baseline or next(iter(results))
    if baseline not in results:
        raise SettingError(f"--baseline {baseline}: expected one of {', '.join(results)}")
    base = results[baseline]
    lines = []
    for name, result in results.items():
        why = unlike(result.documents, base.documents)
        single = name == baseline or why is not None
        difference = None if single else paired(result.documents, base.documents, resamples, seed)
        lines.append(Row(name, result, interval(result.documents, resamples, seed), difference, why))
    head = [text.format(threshold=f"{base.threshold:g}", baseline=baseline) for text in HEAD]
    rows = [line.cells(baseline) for line in lines]
    notes = warnings_of(results, baseline)
    return ProbeComparison(results, head, rows, notes, "", "R-Probe results", lines=lines, baseline=baseline)


def warnings_of(results: Mapping[str, RProbeResult], baseline: str) -> list[str]:
    """What keeps results from being compared with the baseline, and what each was warned of; a sentence each."""
    found = []
    base = results[baseline]
    for name, result in results.items():
        apart = [
            f"{key} = {_said(mine.get(key))} (there {_said(theirs.get(key))})"
            for mine, theirs, keys in ((result.settings, base.settings, SETTINGS), (result.facts, base.facts, FACTS))
            for key in keys
            if _plain(key, mine.get(key, theirs.get(key))) != _plain(key, theirs.get(key, mine.get(key)))
        ]
        if apart:
            found.append(f"{name} differs from {baseline} in more than the model: {', '.join(apart)}")
        if (why := unlike(result.documents, base.documents, (name, baseline))) is not None:
            found.append(f"{name} has other held-out samples than {baseline}, so there is no paired difference: {why}")
    for name, result in results.items():
        if result.settings.get("trained", "all") != "all":
            found.append(f'{name}: trained = "{result.settings["trained"]}": not comparable with probes of all weights')
        if len(result.losses) < result.settings["steps"]:
            found.append(
                f"{name} was stopped after {len(result.losses)} of {result.settings['steps']} steps: not comparable "
                "with finished runs"
            )
    if vacuous := [name for name, result in results.items() if result.threshold_is_vacuous]:
        found.append(
            f"{', '.join(vacuous)}: a constant patch is under the threshold, so steps to it say nothing (in brackets)"
        )
    return found


def _said(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


def _plain(key: str, value: Any) -> Any:
    """A value as it is compared: a source by where it lies, not by how its path is written."""
    try:
        return resolve_source(value) if key.endswith("source") and isinstance(value, str) else value
    except SettingError:  # of another version
        return value


def markdown_page(head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str], title: str) -> str:
    """A table with its footer in Markdown."""
    footer = "\n".join(f"- {note}" for note in notes)
    return f"# {title}\n\n{markdown(head, lines)}\n\n{footer}".rstrip() + "\n"


def _figure(compared: ProbeComparison) -> Any:
    """All curves above; below, each result's error and, where it is paired, its difference to the baseline."""
    lines, base = compared.lines, compared.baseline
    below = 0.75 + 0.17 * len(lines)
    figure = optional("matplotlib.figure").Figure(figsize=(7.0, 2.9 + below), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2.9, below))
    curves = figure.add_subplot(grid[0, :])
    draw_curves(curves, {line.name: line.result for line in lines})
    curves.get_legend().remove()  # beside all panels, so that the layout makes room for it
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    errors = [(line.result.mse, *(line.interval or (None, None))) for line in lines]
    both = any(line.difference is not None for line in lines)
    left = figure.add_subplot(grid[1, 0] if both else grid[1, :])
    draw_intervals(left, [line.name for line in lines], errors, "held-out MSE, 95 % interval")
    if both:
        differences = [(0.0, None, None) if line.name == base else line.difference for line in lines]
        right = figure.add_subplot(grid[1, 1])
        draw_intervals(right, [""] * len(lines), differences, f"MSE minus {plain_name(base)}, paired 95 %")
        right.axvline(0, color="0.35", linewidth=0.8)
    return figure
