"""`llava-patch rprobe`: one file a subcommand; a first word that names none of them is a checkpoint for `run`."""

from __future__ import annotations

import difflib
import os

import typer
from typer.core import TyperGroup

DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """A group whose default subcommand need not be named (a checkpoint called like a subcommand: ./NAME)."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the default subcommand in front of arguments that name none."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            meant = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if meant and not os.path.exists(args[0]):
                ctx.fail(f"no command and no checkpoint is called {args[0]!r}: did you mean {meant[0]!r}?")
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


HELP = """R-Probe: how well pixels can be rebuilt from projected visual tokens.

llava-patch rprobe CKPT [DATA] [OPTIONS] is short for rprobe run:
it trains a small decoder on the tokens of a checkpoint's images and
measures it on held-out ones. Its options: llava-patch rprobe run --help
"""
app = typer.Typer(cls=DefaultGroup, no_args_is_help=True, help=HELP)
