"""Python, packages beside those that llava_patch was run with, hosts and what they import, attention, the hook."""

import functools
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from llava_patch.core.extras import EXTRAS
from llava_patch.core.paths import locks_dir
from llava_patch.integrations import import_hook as autostart
from llava_patch.tools.doctor import NOTE, OK, PROBLEM, Row
from llava_patch.tools.doctor.imports import TRIED

LMMS_EVAL = "0.7"
"""The series of lmms-eval that the tasks were run with."""
_OPTIONAL = {
    "accelerate": "training", "deepspeed": "training on several GPUs", "peft": "LoRA", "flash-attn": "flash attention",
    "lmms-eval": "benchmarks", "llava-torch": "the original host", "timm": "some vision towers",
    **{package: f"the commands of llava_patch[{extra}]" for extra, package in EXTRAS.items()},
}  # fmt: skip
_BOUNDING = ("eval", "hosts")
"""Extras whose bounds say with which versions the hosts work, whether or not they were asked for."""
_HOOKED = "import sys; print(any(type(f).__name__ == '_PostImportFinder' for f in sys.meta_path))"
HOSTS = ("torch", "transformers", "accelerate", "peft", "deepspeed", "lmms-eval", "llava-torch")
"""Packages whose every version is another host; the others of a lock are what those need."""
_PATIENCE = 300  # seconds; a cold disk may take one to read torch


def read_lock(path: Path) -> dict[str, str]:
    """The versions that a lock holds for this Python and platform, by canonical name."""
    versions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate():
                versions[canonicalize_name(need.name)] = str(need.specifier).removeprefix("==")
    return versions


@functools.lru_cache
def lock_of(transformers: str | None) -> tuple[str, dict[str, str]]:
    """Name and versions of the lock with the same major version of transformers and the nearest minor, else of main."""
    locks = {path.stem: read_lock(path) for path in sorted(locks_dir().glob("*.txt"))}
    if transformers is not None:
        series = {name: Version(versions["transformers"]).release for name, versions in locks.items()}
        major, minor = Version(transformers).release[:2]
        if same := [name for name, release in series.items() if release[0] == major]:
            name = min(same, key=lambda n: abs(series[n][1] - minor))
            return name, locks[name]
    return "main", locks["main"]


def installed(distribution: str) -> str | None:
    """A distribution's version; None when it is not installed."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def check_packages() -> list[Row]:
    """Python and every package that llava_patch needs or can use, against the versions that it asks for."""
    rows = [Row("python", sys.version.split()[0])]
    try:
        wanted = [Requirement(line) for line in requires("llava_patch") or []]
    except PackageNotFoundError:
        wanted = []
        advice = "pip install it, or nothing starts with Python"
        rows.append(Row("llava_patch", "run from its source folder", NOTE, advice))
    bounds: dict[str, Requirement] = {}
    core = set()
    for need in wanted:
        asked_by = re.search(r"extra == ['\"]([\w.-]+)['\"]", str(need.marker or ""))
        extra = asked_by and asked_by[1]
        if extra is None:  # everyone needs it
            core.add(need.name)
        if extra == "eval" and installed("lmms-eval") is None:  # what lmms-eval needs to go on working
            continue
        if need.name in bounds:
            bounds[need.name].specifier &= need.specifier
        elif extra is None or need.name in _OPTIONAL or (installed(need.name) is not None and extra in _BOUNDING):
            bounds[need.name] = Requirement(f"{need.name}{need.specifier}")
    for name in _OPTIONAL:
        bounds.setdefault(name, Requirement(name))
    return rows + [_package(need, name not in core) for name, need in bounds.items()]


def _package(need: Requirement, optional: bool) -> Row:
    there = installed(need.name)
    if need.name == "lmms-eval" and there is not None and not there.startswith(f"{LMMS_EVAL}."):
        return Row(need.name, there, NOTE, f"the tasks were run with lmms-eval {LMMS_EVAL} only")
    if there is None and optional:
        return Row(need.name, "not installed", OK, f"needed for {_OPTIONAL[need.name]} only")
    if there is None:
        return Row(need.name, "not installed", PROBLEM, f"pip install '{need.name}{need.specifier}'")
    if not need.specifier.contains(there.split("+")[0], prereleases=True):
        state = NOTE if optional else PROBLEM
        return Row(need.name, there, state, f"supported is {need.specifier}: pip install '{need.name}{need.specifier}'")
    return Row(need.name, there)


def check_torch() -> Row | None:
    """A torch that cannot be imported, with which nothing else can be looked at; None when all is well."""
    error = _import("torch", "nn")
    if not isinstance(error, Exception):
        return None
    advice = "install a build for this machine (https://pytorch.org/get-started); nothing else was looked at"
    return Row("torch: import", f"cannot be imported ({_short(error)})", PROBLEM, advice)


def check_torchvision() -> Row:
    """A torchvision that does not fit its torch breaks the import of LlamaModel; without it everything works."""
    if importlib.util.find_spec("torchvision") is None:
        return Row("torchvision", "not installed", OK, "not needed")
    found = installed("torchvision") or "present"
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # whatever its binary raises, transformers would raise it as well
        advice = "it was built for another torch, and importing Llama models fails with it: pip uninstall torchvision "
        advice += "(nothing here needs it), or install the build that fits your torch"
        return Row("torchvision", f"{found}, cannot be imported ({_short(error)})", PROBLEM, advice)
    return Row("torchvision", found)


def check_hosts() -> list[Row]:
    """Both hosts: whether they can be imported, and which `llava` it is."""
    hf = _import("transformers", "LlavaForConditionalGeneration")
    found = Row("host hf", "Llava, LlavaNext and LlavaOnevision, each with ForConditionalGeneration")
    if isinstance(hf, Exception):
        found = Row("host hf", f"cannot be imported ({_short(hf)})", PROBLEM, "reinstall transformers")
    elif isinstance(_import("transformers", "LlavaModel"), Exception):
        advice = "transformers 4.52 or newer, or the llava package's models"
        found = Row("host hf", "places images inside its own forward, and cannot be patched", NOTE, advice)
    return [found, _check_llava()]


def _check_llava() -> Row:
    from llava_patch.hosts.compat import brings_towers

    what = "host llava"
    if importlib.util.find_spec("llava") is None:
        return Row(what, "not installed", OK, "pip install --no-deps llava-torch, for LLaVA's own checkpoints")
    # By its own module: llava/model/__init__.py swallows the reason why this import fails.
    llava = _import("llava.model.language_model.llava_llama", "LlavaLlamaForCausalLM")
    if isinstance(llava, Exception):
        advice = "its own pins are old: scripts/install.sh has an order of installation that works; with "
        advice += "LLAVA_PATCH_DISABLE=1 LLaVA's code meets transformers unmended"
        return Row(what, f"{_origin()}, cannot be imported ({_short(llava)})", PROBLEM, advice)
    if brings_towers(importlib.import_module("llava.model.multimodal_encoder.builder")):
        advice = "its towers stay its own: of those, fusions and R-Probe know its CLIP and its SigLIP"
        return Row(what, f"{_origin()}, with vision towers of its own, as LLaVA-NeXT's", NOTE, advice)
    return Row(what, _origin())


def _import(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken installation may raise anything
        return error


def _origin() -> str:
    """Which llava it is: the wheel of the package index and the head of the repository share a version number."""
    spec = importlib.util.find_spec("llava")
    assert spec is not None
    places = list(spec.submodule_search_locations or [])
    folder = Path(places[0]) if places else Path(str(spec.origin)).parent
    number = installed("llava-torch") or installed("llava")
    if "site-packages" in folder.parts or "dist-packages" in folder.parts:
        return f"llava-torch {number}, a wheel"
    named = f"llava {number or 'of no version'}"
    checkout = next((p for p in folder.parents if (p / ".git").exists()), None)
    if checkout is None:
        return f"{named}, the folder {folder}"
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "commit not known"
    return f"{named}, the git checkout {checkout} ({commit})"


def check_attention() -> list[Row]:
    """Which attention a model gets, and what LLaVA's train_mem.py gets, which asks for flash attention."""
    import torch

    from llava_patch.hosts.compat import unsupported

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    flash: Any = None if importlib.util.find_spec("flash_attn") is None else _import("flash_attn", "flash_attn_func")
    state, advice = NOTE, "start train.py instead of train_mem.py"
    if flash is None:  # the fallback is the start-up hook's: LLaVA's own code would raise
        has, gets = Row("flash attention", "not installed"), "fails: no flash-attn"
        if unsupported() is None and autostart.disabled():
            advice = "unset LLAVA_PATCH_DISABLE, or start train.py"
        elif unsupported() is None:
            gets, state, advice = "sdpa, because flash-attn is not installed", OK, "nothing to do: sdpa works"
    elif isinstance(flash, Exception):
        mend = "it was built for another torch: rebuild it, or pip uninstall flash-attn (sdpa then takes its place)"
        has, gets = Row("flash attention", f"cannot be imported ({_short(flash)})", PROBLEM, mend), "fails"
    elif capability is None:
        has = Row("flash attention", "installed, no GPU", NOTE, "on a CPU use sdpa")
        gets = "flash_attention_2, which needs a GPU"
    elif capability < (8, 0):
        needs = f"the GPU has compute capability {capability[0]}.{capability[1]}, flash attention 2 needs 8.0"
        has, gets = Row("flash attention", needs, NOTE, "use sdpa"), "fails on this GPU"
    else:
        has = Row("flash attention", installed("flash-attn") or "installed")
        gets, state, advice = "flash_attention_2", OK, ""
    return [Row("attention", "sdpa, eager"), has, Row("train_mem.py", gets, state, advice)]


def check_hook() -> Row:
    """Whether a new interpreter has the start-up hook, which serves unmodified scripts."""
    if autostart.disabled():
        return Row("start-up hook", "off (LLAVA_PATCH_DISABLE=1)", NOTE, "unset LLAVA_PATCH_DISABLE")
    asked = subprocess.run([sys.executable, "-c", _HOOKED], capture_output=True, text=True, check=False)
    if asked.stdout.strip().endswith("True"):
        return Row("start-up hook", "on: starts with Python")
    advice = "pip install llava_patch into this environment (its .pth file is not there, or Python runs without site), "
    advice += "or import llava_patch before LLaVA's code"
    return Row("start-up hook", "missing: a new Python does not start it", NOTE, advice)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def check_measured() -> list[Row]:
    """One row for each host that was never run in the version that is here, and one for what the hosts need."""
    stack, lock = lock_of(installed("transformers"))
    rows, other = [], []
    for name, wanted in lock.items():
        there = (installed(name) or "").partition("+")[0]  # without its build's label, such as "+cpu"
        if there in ("", wanted):
            continue
        if name in HOSTS:
            advice = f"figures and tests are of {wanted}; should something fail: pip install '{name}=={wanted}'"
            rows.append(Row(f"measured: {name}", there, NOTE, advice))
        else:
            other.append(f"{name} {there} ({wanted})")
    if other:
        found = f"{len(other)} of {len(lock)} packages are of another version than measured: {', '.join(other)}"
        advice = f"usually harmless; {stack}.txt of scripts/locks has the versions in brackets"
        rows.append(Row("measured: the rest", found, OK, advice))
    return rows or [Row("measured", f"every version as in {stack}.txt of scripts/locks")]


def start_imports() -> "dict[str, subprocess.Popen[str]]":
    """Processes that import what the hosts' commands go through, by what those are for; see `check_imports`."""
    started = {}
    for command, names in TRIED.items():
        if any(importlib.util.find_spec(name.partition(".")[0]) is not None for name in names):
            started[command] = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "llava_patch.tools.doctor.imports", *names],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
    return started


def stop_imports(started: "dict[str, subprocess.Popen[str]]") -> None:
    """End those processes, whose outcome nobody needs."""
    for process in started.values():
        process.kill()
        process.communicate()


def check_imports(started: "dict[str, subprocess.Popen[str]]") -> list[Row]:
    """Whether training and evaluation commands would find all that they import, now and in the middle of a run."""
    return [row for command, process in started.items() for row in _outcome(command, process)]


def _outcome(command: str, process: "subprocess.Popen[str]") -> list[Row]:
    what = f"imports: {command}"
    try:
        printed, errors = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return [Row(what, f"not done after {_PATIENCE} s", NOTE, "try it by hand")]
    lines = printed.strip().splitlines()
    if process.returncode != 0 or not lines:
        last = (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
        return [Row(what, last[:200], PROBLEM, "importing it ends the interpreter: reinstall it and what it needs")]
    failures = json.loads(lines[-1])
    return [
        Row(f"imports: {command}, {failure['where']}", failure["error"], PROBLEM, advice(failure["module"]))
        for failure in failures
    ] or [Row(what, "all there")]


def advice(module: str) -> str:
    """What to type when a module, or a name of it, is not there."""
    top = module.partition(".")[0]
    name = canonicalize_name((packages_distributions().get(top) or [top])[0])
    there = (installed(name) or "").partition("+")[0]
    stack, lock = lock_of(installed("transformers"))
    wanted = lock.get(name)
    if wanted is None or wanted == there:
        return f"compare this environment with {stack}.txt of scripts/locks, whose versions work together"
    return f"pip install '{name}=={wanted}'" + (f": {there} is installed, {wanted} works" if there else "")
