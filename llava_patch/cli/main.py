"""The console command `llava-patch`."""

import os

import typer

from llava_patch.cli import measure, rprobe, tools
from llava_patch.cli.common import PANEL
from llava_patch.cli.rprobe import compare, data, run  # noqa: F401 - they join `app`
from llava_patch.core import registry
from llava_patch.core.errors import LlavaPatchError

app = typer.Typer(no_args_is_help=True)
app.add_typer(rprobe.app, name="rprobe", rich_help_panel=PANEL)
app.command("correlate", no_args_is_help=True, rich_help_panel=PANEL)(compare.correlate)
app.command("report", no_args_is_help=True, rich_help_panel=PANEL)(tools.report_command)
for name in registry.MEASUREMENTS:
    measure.add(app, name)
app.command("doctor")(tools.doctor_command)
app.command("inspect", no_args_is_help=True)(tools.inspect_command)
app.command("bench")(tools.bench)
app.command("sweep", no_args_is_help=True)(tools.sweep_command)
app.command("convert", no_args_is_help=True)(tools.convert_command)
app.command("merge", no_args_is_help=True)(tools.merge_command)
app.command("gin-files")(tools.gin_files)


@app.callback()
def _root() -> None:
    """Multi-layer vision fusions, DPVR routing, R-Probe and diagnostics for LLaVA models.

    Start with doctor (is everything there?), inspect CKPT (what is it?) and
    report CKPT (every diagnostic in one HTML file).
    """


def main() -> None:
    """Entry point; our own errors are one line, not a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except LlavaPatchError as error:
        raise SystemExit(f"llava-patch: {error}") from error
    except (ImportError, OSError) as error:  # a torch without its libraries raises either
        from llava_patch.tools.doctor.software import check_torch

        broken = check_torch()
        if broken is None:
            raise
        raise SystemExit(f"llava-patch: torch {broken.found}: {broken.advice}") from error


if __name__ == "__main__":
    main()
