"""`llava-patch rprobe`: one file a subcommand; a first word that names none of them is a checkpoint for `run`."""

from __future__ import annotations

import difflib
import os
from typing import Any

import typer
from typer.core import TyperGroup

DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """A group whose default subcommand need not be named (a checkpoint called like a subcommand: ./NAME)."""

    second = "data to measure on goes with --heldout"  # where a second data argument belongs

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the default subcommand in front of arguments that name none."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            meant = difflib.get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if meant and not os.path.exists(args[0]):
                ctx.fail(f"no command and no checkpoint is called {args[0]!r}: did you mean {meant[0]!r}?")
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Say where a second data argument belongs, which click only calls unexpected."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # click's class: typer carries a copy of it in some versions and depends on it in others.
            inner, message = getattr(error, "ctx", None), getattr(error, "message", "")
            if getattr(inner, "info_name", None) == DEFAULT and "unexpected extra argument" in message:
                error.message = f"{message}: CKPT takes one DATA; {self.second}"  # type: ignore[attr-defined]
            raise


HELP = """R-Probe: how well pixels can be rebuilt from projected visual tokens.

llava-patch rprobe CKPT [DATA] [OPTIONS] is short for rprobe run:
it trains a small decoder on the tokens of a checkpoint's images and
measures it on held-out ones. Its options: llava-patch rprobe run --help
"""
app = typer.Typer(cls=DefaultGroup, no_args_is_help=True, help=HELP)
