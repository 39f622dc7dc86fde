"""`llava-patch rprobe`: one file a subcommand; a first word that names none of them is a checkpoint for `run`."""

from __future__ import annotations

import typer

from llava_patch.cli.common import DefaultGroup


class Group(DefaultGroup):
    """A checkpoint and its data are the arguments of `run`."""

    second = "data to measure on goes with --heldout"


HELP = """R-Probe: how well pixels can be rebuilt from projected visual tokens.

llava-patch rprobe CKPT [DATA] [OPTIONS] is short for rprobe run:
it trains a small decoder on the tokens of a checkpoint's images and
measures it on held-out ones. Its options: llava-patch rprobe run --help
"""
app = typer.Typer(cls=Group, no_args_is_help=True, help=HELP)
