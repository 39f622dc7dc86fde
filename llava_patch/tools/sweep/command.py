"""`llava-patch sweep`: plan, run what is still to do, and show what came out."""

import contextlib
import functools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from llava_patch.core.errors import RunError, SettingError
from llava_patch.core.locks import folder_lock
from llava_patch.core.terminal import counted, progress_bar, say_cost, show
from llava_patch.integrations.training import trainer_folder
from llava_patch.tools.sweep import process, record, summary
from llava_patch.tools.sweep.figures import bubble_figure, sweep_figure
from llava_patch.tools.sweep.plan import Run, make_plan, read_sweep
from llava_patch.tools.sweep.settings import Sweep

PLACE = "{checkpoint}"


def sweep(
    file: str,
    output: Path,
    command: Sequence[str],
    seeds: Sequence[int] | None = None,
    evaluate: str | None = None,
    dry_run: bool = False,
    console: Console | None = None,
    overwrite: bool = False,
) -> bool:
    """Run a sweep, or what is left of it; whether every run ended well. Faults are refused before the first starts.

    With `overwrite`, runs of other settings give way. BusyError: another sweep, or a command that one has started,
    works in the folder.
    """
    console = console or Console()
    _check_evaluation(evaluate)
    plan = read_sweep(file)
    runs = make_plan(plan, plan.seeds if seeds is None else seeds, output, command)
    with contextlib.nullcontext() if dry_run else folder_lock(output):
        return _sweep(plan, runs, output, command, evaluate, dry_run, console, overwrite)


def _check_evaluation(evaluate: str | None) -> None:
    if evaluate is None:
        return
    if PLACE not in evaluate:
        raise SettingError(f"--evaluate {evaluate!r}: write {PLACE} where the checkpoint's folder belongs")
    try:
        shlex.split(evaluate)
    except ValueError as error:
        raise SettingError(f"--evaluate {evaluate!r}: {error}: close the quotation mark") from error


def _sweep(
    plan: Sweep,
    runs: Sequence[Run],
    output: Path,
    command: Sequence[str],
    evaluate: str | None,
    dry_run: bool,
    console: Console,
    overwrite: bool,
) -> bool:
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    # Foreign folders and busy ones are refused before anything starts.
    done = [_known(run, evaluate, overwrite, say) for run in runs]
    for run, known in zip(runs, done, strict=True):
        if known is None and not dry_run:
            process.check_free(run.folder)
    if not overwrite and not dry_run:
        summary.check_results(output / "results.json", runs)
    if dry_run:
        for run, known in zip(runs, done, strict=True):
            line = f"[bold]{run.name}[/bold]: {'finished' if known else 'to do'}\n  {shlex.join(run.command)}"
            console.print(line, highlight=False, soft_wrap=True)
        return True
    results = [summary.with_scores(result, plan.scores) for result in _run_all(runs, done, evaluate, overwrite)]
    written = [
        summary.write_results(output / "results.json", results, command, evaluate),
        summary.write_markdown(output / "table.md", results),
    ]
    if summary.measured(results):
        written.append(sweep_figure(results, output / "sweep.png"))
        bubbles = bubble_figure(results, output / "bubbles.png", plan.scores)
        written += [bubbles] if bubbles is not None else []
    means, seeds_table = summary.tables(results).values()
    show(console, *means, [], "Mean ± std over seeds")
    show(console, *seeds_table, summary.notes(results), "Each seed")
    lines, found = [f"wrote {path}" for path in written], set(summary.measured(results))
    for name, metrics in plan.scores.items():
        if name not in found:
            wanting = ", ".join(sorted(set(metrics) - found))
            lines.append(f"Sweep.scores: {name} is not there, for want of {wanting}.")
    for line in lines:
        console.print(line, highlight=False, markup=False)
    return all(result.error is None for result in results)


def _known(run: Run, evaluate: str | None, overwrite: bool, say: Callable[[str], None]) -> summary.Result | None:
    """What is known of a run that is done; OtherRunError: of another one, unless that gives way."""
    try:
        loss, metrics = record.finished(run), record.evaluated(run, evaluate)
    except record.OtherRunError as error:
        if not overwrite:
            raise
        say(f"--overwrite: to be done again: {error}")
        return None
    return None if loss is None or metrics is None else summary.Result(run, loss, metrics)


def _run_all(
    runs: Sequence[Run], done: Sequence[summary.Result | None], evaluate: str | None, overwrite: bool
) -> list[summary.Result]:
    results, left = [], sum(known is None for known in done)
    evaluated = "" if evaluate is None else "an evaluation after each"
    say_cost("sweep", f"{left} of {counted(len(runs), 'run')} to do", evaluated)
    with progress_bar(len(runs), "sweep", True) as bar, process.signals_interrupt():
        say = functools.partial(bar.write, file=sys.stderr)
        for run, known in zip(runs, done, strict=True):
            if known is None:
                bar.set_description(run.name)
                known = _attempt(run, evaluate, overwrite, say)
                if known.error is not None:
                    say(f"failed: {run.name}\n{known.error}")
            results.append(known)
            bar.update()
        bar.set_description("sweep")
    return results


def _attempt(run: Run, evaluate: str | None, overwrite: bool, say: Callable[[str], None]) -> summary.Result:
    try:
        with process.lock(run.folder) as descriptor:
            loss = _trained(run, overwrite)
            if loss is None:
                record.begin(run)
                _pass_over(run, say)
                started = time.monotonic()
                process.execute(run.command, run.folder / "train.log", descriptor)
                loss = record.final_loss(record.trainer_state(run.folder))
                record.finish(run, loss, time.monotonic() - started)
            metrics = _evaluated(run, evaluate, overwrite)
            if metrics is None:
                folder = run.folder / record.EVALUATION
                earlier = frozenset(record.result_files(folder))
                words = [word.replace(PLACE, str(run.folder)) for word in shlex.split(evaluate or "")]
                process.execute([*words, "--output_path", str(folder)], run.folder / "evaluate.log", descriptor)
                metrics = record.metrics(folder, earlier)
                record.finish_evaluation(run, evaluate, metrics)
    except RunError as error:
        return summary.Result(run, error=str(error))
    return summary.Result(run, loss, metrics)


def _trained(run: Run, overwrite: bool) -> record.FinalLoss | None:
    try:
        return record.finished(run)
    except record.OtherRunError:
        if not overwrite:
            raise
        record.clear(run)
        return None


def _evaluated(run: Run, evaluate: str | None, overwrite: bool) -> dict[str, float] | None:
    try:
        return record.evaluated(run, evaluate)
    except record.OtherRunError:
        if not overwrite:
            raise
        return None


def _pass_over(run: Run, say: Callable[[str], None]) -> None:
    """Let a run go on from its newest checkpoint that is whole: a training without a patch stops at half a one."""
    found = trainer_folder.look(run.folder)
    if found is not None and found.broken:
        say(f"{run.name}: {found.said()}")
        found.set_aside()
