"""Throw-away environments: what goes in, and how."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from canary.steps import Steps

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ROOT / "scripts" / "locks"
SHOWN = (
    "torch", "transformers", "tokenizers", "accelerate", "peft", "deepspeed", "huggingface-hub", "safetensors", "numpy",
    "scipy", "pillow", "matplotlib", "jinja2", "datasets", "filelock", "typer", "click", "rich", "gin-config",
    "llava-torch", "lmms-eval",
)  # fmt: skip
_LEFT_OUT = 'python_version < "3"'  # of locks/suite.overrides: never true


class Environment:
    """A virtual environment in a folder, and the steps that are tried in it."""

    def __init__(self, name: str, folder: Path, steps: Steps) -> None:
        self.name, self.folder, self.steps = name, folder, steps
        self.python = folder / "env" / "bin" / "python"
        kept = ("HOME", "LANG", "TMPDIR", "SSL_CERT_FILE")
        own = {key: value for key, value in os.environ.items() if key in kept or key.startswith(("PIP_", "UV_"))}
        self.env = {
            **own, "PATH": f"{self.python.parent}:/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"),
            "LLAVA_PATCH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": str(os.cpu_count()),
            "TOKENIZERS_PARALLELISM": "false", "WANDB_DISABLED": "true", "UV_PYTHON_DOWNLOADS": "never",
        }  # fmt: skip

    def run(self, *words: object, **env: str) -> str:
        """A command in it, from its folder."""
        return self.steps.command(list(words), self.folder, {**self.env, **env})

    def pip(self, *words: object) -> str:
        """Its pip."""
        return self.run(self.python, "-m", "pip", "--disable-pip-version-check", *words)

    def make(self) -> None:
        """An empty one."""
        subprocess.run([sys.executable, "-m", "venv", str(self.folder / "env")], check=True)

    def install(self, lock: Path) -> None:
        """Exactly what a lock says."""
        self.run("bash", LOCKS / "install.sh", self.python, lock)

    def wheel(self) -> Path:
        """Our wheel, as anybody builds it."""
        self.run(self.python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", self.folder, ROOT)
        return next(self.folder.glob("llava_patch-*.whl"))

    def versions(self) -> dict[str, str]:
        """What is installed."""
        listed = json.loads(self.pip("list", "--format=json"))
        return {re.sub(r"[-_.]+", "-", one["name"]).lower(): one["version"] for one in listed}

    def check(self) -> str:
        """What `pip check` says, which ends badly where it says anything of note."""
        words = [str(self.python), "-m", "pip", "check"]
        return subprocess.run(words, capture_output=True, text=True, env=self.env, check=False).stdout


def resolve(environment: Environment) -> Path:
    """The newest or the oldest of everything within pyproject's ranges, beside LLaVA's package and lmms-eval."""
    folder, here = environment.folder, ROOT / "scripts" / "canary"
    subprocess.run([sys.executable, "-m", "venv", str(folder / "tools")], check=True)
    environment.run(folder / "tools" / "bin" / "python", "-m", "pip", "install", "--quiet", _uv())
    command = [folder / "tools" / "bin" / "uv", "--quiet", "--system-certs", "--no-config", "pip", "compile"]
    command += ["--python", environment.python, "--no-annotate", "--no-header", "--prerelease", "disallow"]
    if environment.name == "oldest":
        command += ["--resolution", "lowest-direct", "--constraint", here / "oldest.constraints"]
    # What the main lock leaves out of lmms-eval's requirements is left out here.
    left_out = [line for line in (LOCKS / "suite.overrides").read_text("utf-8").splitlines() if _LEFT_OUT in line]
    (folder / "overrides").write_text("\n".join(left_out) + "\n")
    words = ["--extra", "all", "--extra", "hosts", "--extra", "eval", "--override", folder / "overrides"]
    found = environment.run(*command, ROOT / "pyproject.toml", here / "beside.in", *words)
    # Alone: its pins are of 2023.
    found += environment.run(*command, here / "llava.in", "--no-deps")
    lock = folder / "lock.txt"
    lock.write_text("".join(f"{line}\n" for line in found.splitlines() if not gpu(line)))
    return lock


def gpu(line: str) -> bool:
    """Whether a line of a lock is a package of torch's GPU builds, which torch pins itself."""
    return bool(re.match("(nvidia-(?!ml-py)|cuda-|triton==)", line))


def _uv() -> str:
    """The resolver, at lock.sh's version."""
    found = re.search(r"uv==[\d.]+", (ROOT / "scripts" / "lock.sh").read_text(encoding="utf-8"))
    assert found is not None
    return found[0]
