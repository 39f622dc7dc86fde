"""Sessions of `bash scripts/matrix.sh`: one a stack, then checkpoints from each stack on the other, then the table.

Stacks run in the environments that test.sh makes from the locks; a stack in between is another transformers in front.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from matrix import table  # noqa: E402

WORK = ROOT / ".matrix"
# Those on LLaVA's pins need another accelerate as well, for their Trainer's arguments, and from 4.48 on another timm,
# from which AutoModel imports.
OVERLAYS = {
    "transformers-4.40": ("llava_pinned", "transformers==4.40.2", "tokenizers==0.19.1", "accelerate==0.28.0"),
    "transformers-4.46": ("llava_pinned", "transformers==4.46.3", "tokenizers==0.20.3", "accelerate==0.28.0"),
    "transformers-4.51": (
        "llava_pinned", "transformers==4.51.3", "tokenizers==0.21.1", "accelerate==0.28.0", "timm==1.0.9",
    ),
    "transformers-4.53": ("main", "transformers==4.53.3", "tokenizers==0.21.4"),
    "transformers-4.56": ("main", "transformers==4.56.2", "tokenizers==0.22.1"),
    "transformers-5.0": ("newest", "transformers==5.0.0", "tokenizers==0.22.2"),
    "transformers-5.10": ("newest", "transformers==5.10.1", "tokenizers==0.22.2"),
    "transformers-5.18": ("newest", "transformers==5.18.0"),
}  # fmt: skip
BETWEEN = "import with nothing configured,identities,generate,save and load,train both stages"
PINNED = f"{BETWEEN},resume,ZeRO-2,ZeRO-3,LLaVA's own evaluation"
NEXT = "identities,generate,save and load,LLaVA-NeXT's package,lmms-eval"
TREE, NEXT_TREE = (os.environ.get(f"LLAVA_PATCH_{name}_TREE") for name in ("LLAVA", "NEXT"))
NEXT_NEEDS = ("tyro==1.0.17", "shtab==1.13.0", "typeguard==4.6.1", "docstring-parser==0.18.0", "av==18.1.0")
EXCHANGED = ("main", "newest", "llava_pinned")

nox.options.default_venv_backend = "none"
nox.options.stop_on_first_error = False


def _environment(lock: str, *front: Path) -> dict[str, str]:
    """What a command needs to run in a lock's environment, which is made first, with folders in front of it."""
    say = 'source scripts/install.sh >&2 && echo "$VIRTUAL_ENV"'
    own = {**os.environ, "LLAVA_PATCH_LOCK": lock}
    said = subprocess.run(["bash", "-c", say], cwd=ROOT, env=own, check=True, stdout=subprocess.PIPE, text=True)
    venv = said.stdout.strip()
    return {
        "PATH": f"{venv}/bin:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(map(str, front)), "VIRTUAL_ENV": venv,
        "PYTHON": f"{venv}/bin/python",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false",
        "LLAVA_PATCH_GIN_FILE": "", "LLAVA_PATCH_GIN_PARAM": "", "LLAVA_PATCH_DISABLE": "",
        "LLAVA_PATCH_LLAVA_TREE": "",  # a lock's stack has the lock's llava
    }  # fmt: skip


def _jobs(session: nox.Session, stack: str, environment: dict[str, str], *more: str, tree: str = "") -> None:
    session.chdir(ROOT)
    out = WORK / f"{stack}.json"
    out.unlink(missing_ok=True)
    words = [environment["PYTHON"], "-m", "pytest", "-n", os.environ.get("PYTEST_WORKERS", "2"), "--dist", "worksteal"]
    words += ["-p", "tests.support.jobs", "--jobs-json", str(out), *more, *session.posargs]
    session.run(*words, env=environment, external=True, success_codes=[0, 1])  # failures are in the table
    new = table.column(table.versions(environment), tree, json.loads(out.read_text(encoding="utf-8")))
    if session.posargs:  # a part of the tests must not take the place of all of them
        session.log(f"not kept, since pytest was given arguments:\n{table.markdown({'stacks': {stack: new}})}")
    else:
        table.add(stack, new)


@nox.session
@nox.parametrize("stack", ["main", "newest"], ids=["main", "newest"])
def jobs(session: nox.Session, stack: str) -> None:
    """Every job of both hosts, with what a lock says."""
    _jobs(session, stack, _environment(stack))


@nox.session(name="llava-pinned")
def llava_pinned(session: nox.Session) -> None:
    """What LLaVA pins: its own host, and no lmms-eval."""
    _jobs(session, "llava-pinned", _environment("llava_pinned"), "--jobs", PINNED)


def _front(session: nox.Session, name: str, environment: dict[str, str], packages: tuple[str, ...]) -> Path:
    """A folder with some packages, to put in front of an environment."""
    front = WORK / name
    if not front.is_dir():
        partial = WORK / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        pip = [environment["PYTHON"], "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        session.run(*pip, "--target", str(partial), *packages, env=environment, external=True)
        partial.rename(front)
    return front


@nox.session
@nox.parametrize("stack", list(OVERLAYS), ids=list(OVERLAYS))
def between(session: nox.Session, stack: str) -> None:
    """What depends on transformers most, with one between those of the locks."""
    lock, *packages = OVERLAYS[stack]
    front = _front(session, stack, _environment(lock), tuple(packages))
    _jobs(session, stack, _environment(lock, front), "--jobs", BETWEEN)


@nox.session(name="llava-head")
def llava_head(session: nox.Session) -> None:
    """The same with a checkout of LLaVA in front of its release."""
    if not TREE:
        session.skip("LLAVA_PATCH_LLAVA_TREE names no checkout of LLaVA")
    environment = _environment("main") | {"LLAVA_PATCH_LLAVA_TREE": TREE}
    _jobs(session, "llava-head", environment, tree=table.revision(TREE) or "no git checkout")


@nox.session(name="llava-next")
def llava_next(session: nox.Session) -> None:
    """LLaVA-NeXT's package, a checkout, in front of LLaVA's release."""
    if not NEXT_TREE:
        session.skip("LLAVA_PATCH_NEXT_TREE names no checkout of LLaVA-NeXT")
    front = _front(session, "llava-next-needs", _environment("main"), NEXT_NEEDS)
    environment = _environment("main", front) | {"LLAVA_PATCH_LLAVA_TREE": NEXT_TREE}
    tree = f"LLaVA-NeXT {table.revision(NEXT_TREE) or 'of no git checkout'}"
    _jobs(session, "llava-next", environment, "--jobs", NEXT, tree=tree)


@nox.session
def exchange(session: nox.Session) -> None:
    """Checkpoints that each lock's environment writes, opened in the others."""
    environments = {stack: _environment(stack, ROOT) for stack in EXCHANGED}
    script, rows = str(ROOT / "scripts" / "matrix" / "exchange.py"), {}
    shutil.rmtree(WORK / "exchange", ignore_errors=True)
    for stack, environment in environments.items():
        session.run(
            environment["PYTHON"], script, "write", str(WORK / "exchange" / stack), env=environment, external=True
        )
    for reader, environment in environments.items():
        for writer in EXCHANGED:
            words = [environment["PYTHON"], script, "read", str(WORK / "exchange" / writer)]
            said = session.run(*words, env=environment, external=True, silent=True)
            lines = [json.loads(line) for line in str(said).splitlines() if line.startswith('{"checkpoint"')]
            rows[f"{writer} -> {reader}"] = {line.pop("checkpoint"): line for line in lines}
    table.add_exchange(rows)
