"""Several R-Probe results side by side: one table, one figure, and what keeps them from being compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
    "seed", "rope", "image_mode", "threshold", "masked", "text", "max_text_tokens", "boxes_per_sample", "trained",
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

    `interval` is the bootstrap 95 % interval of its MSE (None: fewer than 2 documents); `difference` is (MSE minus the
    baseline's, low, high), paired over documents, None for the baseline itself and where `unlike` says how the held-out
    samples differ.
    """

    name: str
    interval: tuple[float, float] | None
    difference: tuple[float, float | None, float | None] | None
    unlike: str | None


def find_results(path: Path) -> dict[str, Path]:
    """The result files that a path names, by their folders' names (relative to the path where there are several).

    A path is a result file, or a folder that holds `rprobe.json` in itself or anywhere below (lmms-eval's output).
    """
    path = Path(path)
    if path.is_file():
        return {(path.resolve().parent.name if path.name == RESULT else path.stem): path}
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder")
    if (path / RESULT).is_file():
        return {path.resolve().name: path / RESULT}
    below = sorted(path.rglob(RESULT))
    if not below:
        raise InputError(f"{path}: holds no {RESULT}, in itself or below")
    if len(below) == 1:
        return {path.resolve().name: below[0]}
    return {f"{path.resolve().name}/{file.parent.relative_to(path)}": file for file in below}


def load(paths: Sequence[Path], names: Sequence[str] = ()) -> dict[str, RProbeResult]:
    """Results by name, in order; without names they are called by their folders, numbered where those are alike."""
    found = [(name, file) for path in paths for name, file in find_results(path).items()]
    if names:
        if len(names) != len(found):
            files_found = ", ".join(str(file) for _, file in found)
            raise SettingError(
                f"--names: {counted(len(names), 'name')} for {counted(len(found), 'result')} ({files_found})"
            )
        if len(set(names)) < len(names):
            raise SettingError(f"--names {','.join(names)}: expected distinct names")
        return {name: RProbeResult.load(file) for name, (_, file) in zip(names, found, strict=True)}
    if len({name.split("/")[0] for name, _ in found}) == 1 and all("/" in name for name, _ in found):
        found = [(name.split("/", 1)[1], file) for name, file in found]  # all of one folder
    labels = numbered([name for name, _ in found])
    return {name: RProbeResult.load(file) for name, (_, file) in zip(labels, found, strict=True)}


def numbered(names: Sequence[str]) -> list[str]:
    """Names by which things can be told apart: those that are alike get the number of their place."""
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, 1)]


@dataclass(frozen=True)
class ProbeComparison(Comparison):
    """R-Probe results beside a baseline; `lines` are what the table's rows say, as numbers."""

    lines: Sequence[Row] = ()
    baseline: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The numbers of the table, by the results' names."""
        results = {line.name: _numbers(cast(RProbeResult, self.results[line.name]), line) for line in self.lines}
        return {"baseline": self.baseline, "results": results, "notes": list(self.notes)}

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
        threshold = f"{cast(RProbeResult, self.results[self.baseline]).threshold:g}"
        errors = [[row[0], *_apart(row[2]), *_apart(row[-1])] for row in self.rows]
        rest = [[*row[:2], *row[3:-1]] for row in self.rows]
        return [
            (["result", "MSE", "95 %", "minus base", "paired 95 %"], errors),
            (["result", "docs", "FVU", "PSNR", "in text", "beside", f"to {threshold}", "FVU .5"], rest),
        ]


def compare_probes(
    results: Mapping[str, RProbeResult], baseline: str = "", resamples: int = 2000, seed: int = 0
) -> ProbeComparison:
    """One table with intervals, one figure, and what keeps results from being compared with the baseline (first)."""
    baseline = baseline or next(iter(results))
    if baseline not in results:
        raise SettingError(f"--baseline {baseline}: expected one of {', '.join(results)}")
    base = results[baseline]
    lines = []
    for name, result in results.items():
        why = unlike(result.documents, base.documents)
        single = name == baseline or why is not None
        difference = None if single else paired(result.documents, base.documents, resamples, seed)
        lines.append(Row(name, interval(result.documents, resamples, seed), difference, why))
    head = [text.format(threshold=f"{base.threshold:g}", baseline=baseline) for text in HEAD]
    rows = [_cells(results[line.name], line, baseline) for line in lines]
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
        why = unlike(result.documents, base.documents, (name, baseline))
        if why is not None:
            found.append(f"{name} has other held-out samples than {baseline}, so there is no paired difference: {why}")
    for name, result in results.items():
        if result.settings.get("trained", "all") != "all":
            found.append(f'{name}: trained = "{result.settings["trained"]}": not comparable with probes of all weights')
        if len(result.losses) < result.settings["steps"]:
            found.append(
                f"{name} was stopped after {len(result.losses)} of {result.settings['steps']} steps: not comparable "
                "with finished runs"
            )
    vacuous = [name for name, result in results.items() if result.threshold_is_vacuous]
    if vacuous:
        found.append(
            f"{', '.join(vacuous)}: a constant patch is under the threshold, so steps to it say nothing (in brackets)"
        )
    return found


def _said(value: Any) -> str:
    return "none" if value in (None, "") else str(value)


def _plain(key: str, value: Any) -> Any:
    """A value as it is compared: a source by where it lies, not by how its path is written."""
    if not key.endswith("source") or not isinstance(value, str):
        return value
    try:
        return resolve_source(value)
    except SettingError:  # of another version
        return value


def _apart(cell: str) -> list[str]:
    """A value and its interval."""
    value, _, interval_ = cell.partition(" [")
    return [value, f"[{interval_}" if interval_ else ""]


def _difference(row: Row, baseline: str) -> str:
    if row.name == baseline:
        return "baseline"
    if row.difference is None:
        return "not paired"
    value, low, high = row.difference
    return f"{value:+.4f}" + (" [no interval]" if low is None or high is None else f" [{low:+.4f}, {high:+.4f}]")


def between(limits: tuple[float, float] | None) -> str:
    """An interval behind its value, as text."""
    return " [no interval]" if limits is None else f" [{limits[0]:.4f}, {limits[1]:.4f}]"


def _steps(value: int | None) -> str:
    return "never" if value is None else str(value)


def markdown_page(head: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str], title: str) -> str:
    """A table with its footer in Markdown."""
    footer = "\n".join(f"- {note}" for note in notes)
    return f"# {title}\n\n{markdown(head, lines)}\n\n{footer}".rstrip() + "\n"


def _cells(result: RProbeResult, line: Row, baseline: str) -> list[str]:
    steps = _steps(result.steps_to_threshold)
    return [
        line.name,
        str(len({sample["document"] for sample in result.documents})),
        f"{result.mse:.4f}" + between(line.interval),
        f"{result.fvu:.3f}",
        f"{result.psnr:.1f}",
        *("-" if part is None else f"{part.mse:.4f}" for part in (result.inside, result.outside)),
        f"({steps})" if result.threshold_is_vacuous else steps,
        _steps(result.steps_to_half_fvu),
        _difference(line, baseline),
    ]


def _numbers(result: RProbeResult, line: Row) -> dict[str, Any]:
    parts = {"inside": result.inside, "outside": result.outside}
    return {
        "mse": result.mse,
        "mse_interval": line.interval,
        "difference": None if line.difference is None else line.difference[0],
        "difference_interval": None if line.difference is None else line.difference[1:],
        "unlike": line.unlike,
        **{key: getattr(result, key) for key in _SHOWN},
        **{f"{where}_mse": None if part is None else part.mse for where, part in parts.items()},
    }


def _figure(compared: ProbeComparison) -> Any:
    """All curves above; below, each result's error and, where it is paired, its difference to the baseline."""
    Figure = optional("matplotlib.figure").Figure
    results = cast(Mapping[str, RProbeResult], compared.results)
    below = 0.75 + 0.17 * len(results)
    figure = Figure(figsize=(7.0, 2.9 + below), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2.9, below))
    curves: Any = figure.add_subplot(grid[0, :])
    draw_curves(curves, results)
    curves.get_legend().remove()  # beside all panels, so that the layout makes room for it
    figure.legend(*curves.get_legend_handles_labels(), loc="outside right upper", fontsize=7, frameon=False)
    errors = [(results[line.name].mse, *(line.interval or (None, None))) for line in compared.lines]
    both = any(line.difference is not None for line in compared.lines)
    left = figure.add_subplot(grid[1, 0] if both else grid[1, :])
    draw_intervals(left, list(results), errors, "held-out MSE, 95 % interval")
    if both:
        base = compared.baseline
        differences = [(0.0, None, None) if line.name == base else line.difference for line in compared.lines]
        right = figure.add_subplot(grid[1, 1])
        draw_intervals(right, [""] * len(results), differences, f"MSE minus {plain_name(base)}, paired 95 %")
        right.axvline(0, color="0.35", linewidth=0.8)
    return figure
