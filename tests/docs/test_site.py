"""The documentation: it builds without a warning and without a network, and says nothing that is not there."""

import os
import re
import shlex
import subprocess
import sys

import pytest

import llava_patch
from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OFFLINE = """
import socket
def refuse(*given): raise OSError("the site needs a network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="needs llava_patch[docs]")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-c", OFFLINE, "build", "--strict", "-f", ".mkdocs.yml", "-d", str(folder)]
    done = subprocess.run(
        build, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_is_on_the_api_page(site):
    shown = set(re.findall(r'id="llava_patch\.(\w+)"', (site / "api.html").read_text(encoding="utf-8")))
    assert shown == {name for name in llava_patch.__all__ if name != "__version__"}


def test_the_pages_show_the_code_that_defines_a_method(site):
    page = re.sub("<[^>]+>", "", (site / "methods.html").read_text(encoding="utf-8"))
    assert "asking = giving = text" in page and "states.detach()" in page


def test_a_page_fetches_nothing_from_elsewhere(site):
    fetched = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\"'\s>]+")
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    found = [(page.name, link) for page in pages for link in fetched.findall(page.read_text(encoding="utf-8"))]
    assert [one for one in found if 'rel="canonical"' not in one[1]] == []


def _commands():
    """(page, words) of each `llava-patch` command that a page's code blocks show."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
            for line in block.replace("\\\n", " ").splitlines():
                if match := re.match(r"(?:\w+=\S+ )*llava-patch (.*)", line):
                    yield page.name, shlex.split(match[1], comments=True)


def test_every_command_and_option_that_a_page_shows_exists():
    import typer.main

    from llava_patch.cli import main

    wrong, seen = [], 0
    for page, words in _commands():
        command, rest = typer.main.get_command(main.app), list(words)
        while hasattr(command, "commands") and rest and rest[0] in command.commands:
            command = command.commands[rest.pop(0)]
        if hasattr(command, "commands") and "run" in command.commands:  # `rprobe CKPT` is `rprobe run CKPT`
            command = command.commands["run"]
        if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            wrong.append((page, words))
        known = {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
        ours = rest[: rest.index("--")] if "--" in rest else rest  # `sweep … -- COMMAND`
        asked = {word.partition("=")[0] for word in ours if word.startswith("-")}
        wrong += [(page, words, word) for word in asked - known - {"--help", "-h"}]
        seen += 1
    assert wrong == [] and seen > 40


def test_every_gin_file_that_a_page_shows_is_shipped():
    named = {name for page in PAGES for name in re.findall(r"--gin_file (\w+\.gin)", page.read_text(encoding="utf-8"))}
    assert len(named) > 3 and {name for name in named if not (ROOT / "gin" / name).exists()} == set()
