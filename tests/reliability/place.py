"""Rows of the catalogue of bad input, and the place where one is tried.

A row is one piece of bad input: what is wrong in words, how it is made, the command or call that meets it, what its one
error must say, and the exit code. Files `rows_*.py` hold lists of them:

    def settings_that_are_a_list(place):
        adapter = place.adapter()
        (adapter / "llava_patch.json").write_text("[]")
        return place.command("inspect", adapter)  # or a function without arguments, for a call in Python

    ROWS = [Row("adapters", "settings that are a list", settings_that_are_a_list, ("llava_patch.json", "expected"))]
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from llava_patch.core.errors import LlavaPatchError

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One piece of bad input."""

    kind: str  # part of the catalogue
    what: str  # the input, in words
    make: Callable[["Place"], Call]  # writes it into the place and gives the call that meets it
    says: tuple[str, ...]  # what the error must hold: the setting, file or line, and what to do
    code: int = 2  # exit code: 2 for the caller's mistakes, 1 for failures

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.what}"


@dataclass(frozen=True)
class Outcome:
    """What became of a row."""

    code: int | None  # None: nothing was wrong
    text: str  # the error
    trace: str = ""  # of an error that is none of ours
    changed: tuple[str, ...] = ()  # files that were written, changed or taken away

    def faults(self, row: Row) -> list[str]:
        """Why this is not what the row asks for."""
        found = []
        if self.code is None:
            found.append("accepted without a word")
        elif self.trace:
            found.append(f"not an error of ours:\n{self.trace}")
        elif self.code != row.code:
            found.append(f"exit code {self.code}, expected {row.code}: {self.text}")
        found += [f"{word!r} is not in: {self.text}" for word in row.says if word not in self.text]
        if "Traceback" in self.text or len(self.text) > 2000:
            found.append(f"more than one clear line: {self.text[:300]}")
        found += [f"changed: {path}" for path in self.changed]
        return found


class Place:
    """A folder in which one row is tried, with checkpoints to spoil; those are made once and copied."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    # --- what rows need -----------------------------------------------------------------------------------------------

    def file(self, name: str, content: Any = "") -> Path:
        """A file of bytes, of text, or of anything else as JSON."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def stock(self, name: str = "model") -> Path:
        """A tiny stock HF checkpoint with tokenizer and processor."""
        return self._copy(_stock(), name)

    def llava(self, name: str = "llava") -> Path:
        """A tiny stock checkpoint of the original `llava`, its tower and tokenizer in folders of their own."""
        return self._copy(_llava(), name)

    def adapter(self, name: str = "adapter") -> Path:
        """An adapter of LF routing on the stock model (which is not in this place)."""
        return self._copy(_saved("adapter"), name)

    def full(self, name: str = "full") -> Path:
        """The same model saved whole."""
        return self._copy(_saved("full"), name)

    def image(self, name: str = "page.png", size: tuple[int, int] = (64, 48)) -> Path:
        """A picture."""
        from PIL import Image

        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (200, 180, 160)).save(path)
        return path

    def _copy(self, source: Path, name: str) -> Path:
        shutil.copytree(source, self.root / name)
        return self.root / name

    @staticmethod
    def edit(path: Path, **changes: Any) -> Path:
        """Change fields of a JSON file; None takes one away."""
        values = {k: v for k, v in json.loads(path.read_text()).items() if k not in changes}
        path.write_text(json.dumps({**values, **{k: v for k, v in changes.items() if v is not None}}))
        return path

    @staticmethod
    def cut(path: Path, share: float = 0.5) -> Path:
        """Cut a file off."""
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    def command(self, *words: Any) -> Call:
        """The console command with these words, run in this process and in this place."""

        def run() -> None:
            from llava_patch.cli.main import main

            with mock.patch.object(sys, "argv", ["llava-patch", *map(str, words)]):
                main()

        return run

    # --- trying -------------------------------------------------------------------------------------------------------

    def attempt(self, row: Row) -> Outcome:
        """Make a row's input, meet it, and say what came of it."""
        from llava_patch.settings import active

        call = row.make(self)
        before, said = self.digests(), io.StringIO()
        code: int | None = None
        trace = ""
        where = os.getcwd()
        os.chdir(self.root)
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                try:
                    call()
                except SystemExit as end:
                    code, text = (1, str(end.code)) if isinstance(end.code, str) else (end.code or None, "")
                    said.write(text)
                    cause = end.__cause__
                    if cause is not None and not isinstance(cause, LlavaPatchError) and "unexpected" in said.getvalue():
                        trace = "".join(traceback.format_exception(cause))
                except LlavaPatchError as error:
                    code = error.exit_code
                    said.write(str(error))
                except Exception as error:
                    code, trace = 1, "".join(traceback.format_exception(error))
        finally:
            os.chdir(where)
            active.reset()
        after = self.digests()
        changed = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
        return Outcome(code, " ".join(said.getvalue().split()), trace, tuple(changed))

    def digests(self) -> dict[str, str]:
        """Every file and folder below the place, with what is in it."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            if path.is_symlink():
                found[name] = f"link to {os.readlink(path)}"
            elif path.is_file() and os.access(path, os.R_OK):
                found[name] = hashlib.blake2b(path.read_bytes()).hexdigest()
            else:
                found[name] = "folder" if path.is_dir() else "other"
        return found


@functools.cache
def _made() -> Path:
    """A folder of this process, which goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _stock() -> Path:
    from tests.support import fileset
    from tests.support.models import needs_hf

    needs_hf()
    return fileset.write_hf(_made() / "stock")


@functools.cache
def _llava() -> Path:
    from tests.support import fileset

    folder = _made() / "llava"
    fileset.llava_model(_made() / "tower").save_pretrained(folder)
    fileset.tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def _saved(form: str) -> Path:
    from transformers import LlavaForConditionalGeneration

    from llava_patch import Routing, patch

    model = LlavaForConditionalGeneration.from_pretrained(_stock())
    with patch(model, routing=Routing(split=2)) as handle:
        return handle.save(_made() / form, form=form)


@functools.cache
def open_stock() -> Any:
    """The stock model, loaded once; who patches it takes the patch off again."""
    stock = _stock()
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(stock).eval()
