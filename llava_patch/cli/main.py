"""The console command `llava-patch`."""

import io
import os
import sys

import typer

from llava_patch.cli import demo, evidence, measure, rprobe, tools
from llava_patch.cli.common import PANEL
from llava_patch.cli.rprobe import compare, data, run  # noqa: F401 - they join `app`
from llava_patch.core import registry
from llava_patch.core.errors import LlavaPatchError, brief
from llava_patch.core.version import __version__

TRACEBACK = "LLAVA_PATCH_TRACEBACK"

app = typer.Typer(no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(rprobe.app, name="rprobe", rich_help_panel=PANEL)
app.command("correlate", no_args_is_help=True, rich_help_panel=PANEL)(compare.correlate)
app.command("report", no_args_is_help=True, rich_help_panel=PANEL)(tools.report_command)
for name in registry.MEASUREMENTS:
    measure.add(app, name)
app.command("doctor")(tools.doctor_command)
app.command("inspect", no_args_is_help=True)(tools.inspect_command)
app.command("bench")(tools.bench)
app.command("demo", no_args_is_help=True)(demo.demo)
app.command("evidence")(evidence.evidence)
app.command("sweep", no_args_is_help=True)(tools.sweep_command)
app.command("convert", no_args_is_help=True)(tools.convert_command)
app.command("merge", no_args_is_help=True)(tools.merge_command)
app.command("gin-files")(tools.gin_files)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"llava_patch {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_say_version, is_eager=True, help="which one this is"),
) -> None:
    """Multi-layer vision fusions, DPVR routing, R-Probe and diagnostics for LLaVA models.

    Start with doctor (is everything there?), inspect CKPT (what is it?) and
    report CKPT (every diagnostic in one HTML file).
    """


def main() -> None:
    """Entry point: every error is one line and an exit code, 2 for what the caller can put right, 1 for a failure.

    `LLAVA_PATCH_TRACEBACK=1` shows where it came from.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal in ASCII, or a name that no encoding has
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except SystemExit as end:
        if _interrupted(end):
            print("interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        code, text = said_of(error)
        print(f"llava-patch: {text}", file=sys.stderr)
        raise SystemExit(code) from error


def _interrupted(end: SystemExit) -> bool:
    """Whether the command line's library ended a command because of Ctrl-C, for which it has the code of a failure."""
    abort = end.__context__
    return abort is not None and isinstance(abort.__cause__, KeyboardInterrupt)


def said_of(error: Exception) -> tuple[int, str]:
    """The exit code and the line for an error that ends a command."""
    if isinstance(error, LlavaPatchError):
        return error.exit_code, str(error)
    if isinstance(error, (ImportError, OSError)):  # a torch without its libraries raises either
        from llava_patch.tools.doctor.software import check_torch

        if (broken := check_torch()) is not None:
            return 1, f"torch {broken.found}: {broken.advice}"
    if any(word in str(error).lower() for word in ("out of memory", "can't allocate memory")) or isinstance(
        error, MemoryError
    ):
        return 1, f"out of memory ({brief(error)}): give a smaller --dtype, another --device or fewer --samples"
    return 1, (
        f"unexpected {type(error).__name__}: {brief(error)} ({TRACEBACK}=1 shows where; if the input is sound, please "
        "report it)"
    )


if __name__ == "__main__":
    main()
