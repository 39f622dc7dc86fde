"""The command `llava-patch evidence`."""

import os
from pathlib import Path
from typing import Optional

import typer

from llava_patch.cli.common import DEVICE, check_output
from llava_patch.core.errors import SettingError
from llava_patch.core.extras import needs


@needs("evidence", "figures", "report", "probe")
def evidence(
    output: Path = typer.Option(  # noqa: B008
        Path("evidence"), help="folder for results and report; the same one again goes on"
    ),
    quick: bool = typer.Option(False, "--quick", help="the quickest runs of every study: about 15 minutes on 2 cores"),
    tier: str = typer.Option("cpu", help="cpu (up to 90 minutes on 2 cores) or gpu (larger models, more seeds)"),
    only: list[str] = typer.Option([], help="this study only, with what it needs; may be repeated"),  # noqa: B008
    seeds: Optional[int] = typer.Option(None, min=1, help="of every run; fewer than 3 decide nothing"),
    jobs: int = typer.Option(0, min=0, help="runs at a time; default: one a core, one on a GPU"),
    minutes: Optional[float] = typer.Option(None, min=0, help="begin nothing after so many; again goes on"),
    device: str = DEVICE,
    listed: bool = typer.Option(False, "--list", help="show what would be run and what is there; do nothing"),
    source: Optional[Path] = typer.Option(  # noqa: B008
        None, "--from", help="write the report of this evidence.json into OUTPUT; runs nothing"
    ),
) -> None:
    """Measure which of the papers' claims hold on small models, each with its control.

    Small LLaVA models are trained on the spot, effects are planted in them to
    show that every instrument would see one, then the claims are measured.
    OUTPUT gets evidence.html, evidence.md, evidence.json and the figures. The
    same command gives the same numbers on one machine, and goes on where it
    was stopped. Exit code 1 when a run failed.
    """
    from rich.console import Console
    from rich.markup import escape

    from llava_patch.core.files import write_json
    from llava_patch.core.locks import folder_lock
    from llava_patch.data.loaded import pick_device
    from llava_patch.tools.bench.report import machine
    from llava_patch.tools.evidence import report, run
    from llava_patch.tools.evidence.study import SIZES
    from llava_patch.tools.sweep.process import signals_interrupt

    console = Console()
    say = lambda line: console.print(escape(line), soft_wrap=True, highlight=False)  # noqa: E731

    def finish(values: dict) -> None:
        every = report.sections(values)
        for section in every:
            for finding in section.findings:
                say(f"{finding.verdict:24} {finding.claim}")
        say(report.counts(every))
        for path in report.write(values, output):
            say(f"wrote {path}")

    if tier not in ("cpu", "gpu"):
        raise SettingError(f"--tier {tier}: expected cpu or gpu")
    if quick and tier == "gpu":
        raise SettingError("--quick is a part of the cpu tier: leave --tier out")
    check_output(output)
    if source is not None:
        values = run.read(source)
        with folder_lock(output):
            finish(values)
        return
    size = run.with_seeds(SIZES[tier], seeds)
    device = pick_device(device or ("cuda" if tier == "gpu" else "cpu"))
    every = run.tasks(run.chosen(only), size, quick, device)
    jobs = jobs or (1 if device.startswith("cuda") else len(os.sched_getaffinity(0)))
    missing = [task for task in every.values() if run.kept(output, task) is None]
    cost = sum(task.run.seconds for task in missing) / 60
    if listed:
        for task in every.values():
            state = "to do" if task in missing else "there"
            say(f"{state:6} {task.run.seconds:6.0f} s  {task.label}")
    say(f"{len(missing)} of {len(every)} runs to do, about {cost:.0f} minutes of one core, {jobs} at a time")
    if listed:
        return
    with folder_lock(output):
        try:
            with signals_interrupt():  # or the processes would go on without the command
                failed = run.do(every, output, size, device, jobs, minutes, say)
        except KeyboardInterrupt:
            say("interrupted: the same command again goes on from here")
            raise typer.Exit(130) from None
        import torch

        values = run.collect(every, output, size, machine(torch.device(device))["device"])
        write_json(output / run.KEPT, values)
        finish(values)
    left = len(every) - sum(len(one["seeds"]) for one in values["runs"].values())
    if left:
        say(f"{left} runs are left: the same command again goes on")
    raise typer.Exit(1 if failed else 0)
