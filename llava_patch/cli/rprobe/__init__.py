"""`llava-patch rprobe`: a first word that names none of its subcommands is a checkpoint for `run`."""

import typer

from llava_patch.cli.common import DefaultGroup

BOXES_PER_SAMPLE = typer.Option(1, min=1, help="regions of a page that make one sample")
BROKEN = typer.Option("stop", help="what becomes of broken samples: stop or skip (as SOURCE?broken=skip)")
HELP = """R-Probe: how well pixels can be rebuilt from projected visual tokens.

llava-patch rprobe CKPT [DATA] [OPTIONS] is short for rprobe run:
it trains a small decoder on the tokens of a checkpoint's images and
measures it on held-out ones. Its options: llava-patch rprobe run --help
"""


_GROUP = type("RProbeGroup", (DefaultGroup,), {"second": "data to measure on goes with --heldout"})
app = typer.Typer(cls=_GROUP, no_args_is_help=True, help=HELP)
