"""The README's line for installing, in LLaVA's own environment: nothing that is there changes.

Packages are stand-ins of the pinned environment's names and versions; a folder holds newer ones of each, which pip
takes wherever a requirement of ours lets it. The real environment is run by scripts/canary.sh.
"""

import base64
import hashlib
import os
import re
import shlex
import subprocess
import sys
import zipfile

import pytest
from packaging.utils import canonicalize_name

from .project import LOCKS, ROOT, core, extra, locked

PINNED = locked(LOCKS / "llava_pinned.txt")
NEEDS = {
    "llava-torch": ["torch==2.0.1", "transformers==4.36.2", "tokenizers==0.15.0", "peft==0.4.0", "gradio==4.16.0"],
    "transformers": ["tokenizers<0.19,>=0.14", "huggingface-hub<1.0,>=0.19.3", "numpy>=1.17", "filelock"],
    "gradio": ["typer[all]<1.0,>=0.9", "pillow<11.0,>=8.0", "numpy~=1.0"],
}
"""Some of what packages there ask for, so that `pip check` has something to say before we come."""
NEWER = {
    **dict.fromkeys(PINNED, "99.0"), "torch": "2.14.1", "transformers": "4.57.6", "gin-config": "0.5.0",
    "datasets": "5.0.1",
}  # fmt: skip


def _metadata(name, version):
    return "".join(
        f"{line}\n"
        for line in ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Provides-Extra: all",
                     *(f"Requires-Dist: {need}" for need in NEEDS.get(name, []))]
    )  # fmt: skip


def _wheel(folder, name, version):
    info = f"{name.replace('-', '_')}-{version}"
    files = {
        f"{info}.dist-info/METADATA": _metadata(name, version),
        f"{info}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(text)}\n")
    with zipfile.ZipFile(folder / f"{info}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}.dist-info/RECORD", "".join(rows) + f"{info}.dist-info/RECORD,,\n")


class Environment:
    def __init__(self, root):
        subprocess.run([sys.executable, "-m", "venv", str(root / "env")], check=True)
        self.python, self.index = root / "env" / "bin" / "python", root / "index"
        self.index.mkdir()
        site = next((root / "env" / "lib").glob("python*/site-packages"))
        for name, version in PINNED.items():
            if name in ("setuptools", "wheel"):
                continue
            info = site / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(_metadata(name, version))
            (info / "INSTALLER").write_text("pip\n")
            (info / "RECORD").write_text(f"{info.name}/METADATA,,\n{info.name}/INSTALLER,,\n{info.name}/RECORD,,\n")
        for name, version in NEWER.items():
            _wheel(self.index, name, version)
        build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(root)]
        subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
        self.ours = next(root.glob("llava_patch-*.whl"))

    def pip(self, *words):
        settings = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
        command = [str(self.python), "-m", "pip", "--isolated", "--disable-pip-version-check", *map(str, words)]
        settings["PIP_CONFIG_FILE"] = os.devnull  # neither the user's index nor anybody's constraints
        return subprocess.run(command, capture_output=True, text=True, env=settings)

    def install(self, *words):
        done = self.pip("install", "--no-index", "--find-links", self.index, *words)
        assert done.returncode == 0, done.stdout + done.stderr

    def versions(self):
        code = "from importlib.metadata import distributions as d; print(*{f'{i.name}=={i.version}' for i in d()})"
        done = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True)
        return {canonicalize_name(name): number for name, number in (w.split("==") for w in done.stdout.split())}


def _lines():
    """The commands of the README and of docs/install.md that install."""
    pages = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/install.md"))
    blocks = [text for _, text in re.findall(r"^```(\w*)\n(.*?)^```", pages, re.M | re.S)]
    found = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in found if line.startswith("pip install")))


@pytest.mark.timeout(300)
def test_installing_moves_nothing_in_llavas_environment(tmp_path):
    first, *others = _lines()
    assert first == "pip install ."  # of a checkout; what it installs is the wheel that is built of it
    assert others == ['pip install "llava_patch[all]"']
    environment = Environment(tmp_path)
    before, said = environment.versions(), environment.pip("check").stdout
    assert before.items() >= {n: v for n, v in PINNED.items() if n not in ("setuptools", "wheel")}.items()
    assert "llava-torch 1.2.2.post1 has requirement torch==2.0.1, but you have torch 2.1.2." in said

    environment.install(environment.ours)
    after = environment.versions()
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"llava-patch", "gin-config"}
    assert environment.pip("check").stdout == said

    environment.install(*shlex.split(others[0])[2:])
    last = environment.versions()
    assert {name: last[name] for name in after} == after
    assert set(last) - set(after) == {"datasets"}
    assert environment.pip("check").stdout == said


def test_the_folder_tempts_with_a_newer_one_of_everything_that_we_ask_for():
    for need in [*core(), *extra("all")]:
        name = canonicalize_name(need.name)
        assert name in NEWER and NEWER[name] != PINNED.get(name), name
