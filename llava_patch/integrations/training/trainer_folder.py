"""The checkpoint-N folders of a Trainer's run: which a run can go on from, told by the files that it would read there.

A Trainer writes them in place, trainer_state.json last, and removes old ones file by file: whoever is killed leaves
half a folder. Headers and lists of contents are read, no tensor and no pickle. Imports neither torch nor transformers:
sweeps ask as well, of whatever they train.
"""

import itertools
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llava_patch.core import stored
from llava_patch.core.errors import CheckpointError, brief, shown

PREFIX, ASIDE = "checkpoint-", "unfinished-"
STATE = "trainer_state.json"
_TORCH = (
    "pytorch_model*.bin", "adapter_model*.bin", "mm_projector.bin", "optimizer*.pt", "optimizer*.bin", "scheduler.pt",
    "scaler.pt", "rng_state*.pth",
)  # fmt: skip
_JSON = ("config.json", "adapter_config.json", "llava_patch.json")
_SHARDED = (("model", "safetensors"), ("pytorch_model", "bin"))
_WEIGHTS = (
    "model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*/adapter_model.*", "pytorch_model_fsdp*",
    "mm_projector.bin", "latest",
)  # fmt: skip
_OLD_TORCH = b"\x80"
"""torch's format before 1.6 begins so; nothing there says where it ends."""


@dataclass(frozen=True)
class Found:
    """The checkpoints of a folder of runs."""

    whole: Path | None  # the newest that a run can go on from
    broken: dict[Path, str]  # newer ones, and which file is missing or not whole

    def said(self) -> str:
        """What is the matter, in one line."""
        goes_on = "begins anew" if self.whole is None else f"goes on from {self.whole}"
        return (
            f"not written to the end, and set aside as {ASIDE}...: {'; '.join(self.broken.values())}. "
            f"Training {goes_on}"
        )

    def set_aside(self) -> None:
        """Rename the broken ones: as the highest they would outlive, under save_total_limit, all that are whole."""
        for folder in self.broken:
            suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
            names = (folder.with_name(f"{ASIDE}{folder.name}{suffix}") for suffix in suffixes)
            folder.rename(next(name for name in names if not name.exists()))


def look(output: Path, weights_alone: bool | None = None) -> Found | None:
    """The checkpoints of a run's folder, from the newest to the first that is whole; None: there are none.

    `weights_alone`: as of `check`.
    """
    numbers = {path: path.name.removeprefix(PREFIX) for path in output.glob(f"{PREFIX}*") if path.is_dir()}
    folders = sorted((p for p, n in numbers.items() if n.isdecimal()), key=lambda p: -int(numbers[p]))
    broken: dict[Path, str] = {}
    for folder in folders:
        why = why_not(folder, weights_alone)
        if not why:
            return Found(folder, broken)
        broken[folder] = why
    return Found(None, broken) if folders else None


def newest_whole(output: Path) -> Path | None:
    """The newest checkpoint of a run's folder that a run can go on from."""
    found = look(output)
    return None if found is None else found.whole


def why_not(folder: Path, weights_alone: bool | None = None) -> str:
    """Which file of a checkpoint is missing or not whole, and why; "" where it is whole.

    CheckpointError: a file that is there cannot be read, which says nothing about what is in it.
    """
    try:
        check(folder, weights_alone)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        return str(error)
    return ""


def check(folder: Path, weights_alone: bool | None = None) -> None:
    """Refuse a checkpoint that a run cannot go on from as if it had not been broken off (CheckpointError).

    `weights_alone`: whether the run keeps no optimizer (save_only_model); None: what is there tells.
    """
    stored.field(stored.read_object(folder / STATE), "global_step", int, folder / STATE)
    _check_files(folder)
    for adapter in sorted({path.parent for name in ("", "*/") for path in folder.glob(f"{name}adapter_*")}):
        _need(adapter, "adapter_config.json")
        _need(adapter, "adapter_model.safetensors", "adapter_model.bin")
        if adapter != folder:
            _check_files(adapter)
    for stem, suffix in _SHARDED:
        _check_shards(folder, stem, suffix)
    ranks = _check_deepspeed(folder)
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise CheckpointError(f"{folder / 'model.safetensors'}: is missing, and no other weights are there")
    for sharded in (*folder.glob("pytorch_model_fsdp*/"), *folder.glob("optimizer*/")):
        if sharded.is_dir():
            _check_distributed(sharded)
    _check_state(folder, ranks, weights_alone)


def _check_files(folder: Path) -> None:
    for path in sorted(folder.glob("*.safetensors")):
        stored.read_shapes(path)
    for path in sorted(file for pattern in _TORCH for file in folder.glob(pattern) if file.is_file()):
        check_torch(path)
    for name in _JSON:
        if (folder / name).is_file():
            stored.read_object(folder / name)


def _check_shards(folder: Path, stem: str, suffix: str) -> None:
    """The weights of a model in several files: all that the index names are there."""
    index = folder / f"{stem}.{suffix}.index.json"
    if not index.is_file():
        if any(folder.glob(f"{stem}-*-of-*.{suffix}")):
            raise CheckpointError(f"{index}: is missing")
        return
    shards = stored.field(stored.read_object(index), "weight_map", dict, index).values()
    if not stored.strings(list(shards)):
        raise CheckpointError(f"{index}: weight_map: expected names of files")
    for name in sorted(set(shards)):
        _need(folder, name)


def _check_distributed(folder: Path) -> None:
    """torch.distributed.checkpoint's folder, whose list of contents is written last."""
    listed = folder / ".metadata"
    if not listed.is_file() or not listed.read_bytes().endswith(b"."):
        raise CheckpointError(f"{listed}: is {'not whole' if listed.is_file() else 'missing'}")
    for path in sorted(folder.glob("*.distcp")):
        if not path.stat().st_size:
            raise CheckpointError(f"{path}: is empty")


def _check_deepspeed(folder: Path) -> int:
    """DeepSpeed's folder, which its file `latest` names; returns how many ranks keep an optimizer there."""
    latest = folder / "latest"
    if not latest.is_file():
        if any(folder.glob("global_step*/")):
            raise CheckpointError(f"{latest}: is missing")
        return 0
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or "/" in tag or not (folder / tag).is_dir():
        raise CheckpointError(f"{latest}: names {shown(tag)}, which is not there")
    states = [path.name for path in (folder / tag).glob("*.pt")]
    if not any(name.endswith("model_states.pt") for name in states):
        raise CheckpointError(f"{folder / tag}: no *model_states.pt is there")
    alone = not any("mp_rank_01" in name for name in states)  # every rank has a part of the optimizer's state
    ranks = len(_ranks(folder)) if alone else 0
    for kind in ("optim", "model"):
        found = [m for n in states if (m := re.fullmatch(rf"(.*zero_pp_rank_)(\d+)(_.*{kind}_states\.pt)", n))]
        for rank in range(max([ranks, *(int(match[2]) + 1 for match in found)]) if found else 0):
            _need(folder / tag, f"{found[0][1]}{rank}{found[0][3]}")
        ranks = max(ranks, len(found))
    for name in sorted(states):
        check_torch(folder / tag / name)
    return ranks or 1


def _ranks(folder: Path) -> list[int]:
    """Ranks whose random states are there; a single process numbers none."""
    found = (re.fullmatch(r"rng_state_(\d+)\.pth", path.name) for path in folder.iterdir())
    return [int(match[1]) for match in found if match]


def _check_state(folder: Path, deepspeed: int, weights_alone: bool | None) -> None:
    """The states of optimizer, schedule and random numbers, of which a run that keeps any keeps all."""
    ranks = _ranks(folder)
    expected = {
        "optimizer.pt": deepspeed > 0 or any(folder.glob("*optimizer*")),
        "scheduler.pt": deepspeed > 0 or (folder / "scheduler.pt").is_file(),
        "rng_state.pth": bool(ranks) or (folder / "rng_state.pth").is_file(),
    }
    if weights_alone or (weights_alone is None and not any(expected.values())):
        return
    for name, there in expected.items():
        if not there:
            raise CheckpointError(f"{folder / name}: is missing")
    if ranks:
        for rank in range(max(2, deepspeed, max(ranks) + 1)):
            _need(folder, f"rng_state_{rank}.pth")


def check_torch(path: Path) -> None:
    """Refuse a file of `torch.save` that was cut off (CheckpointError): what ends it lists all that is in it."""
    try:
        with path.open("rb") as stream:
            if stream.read(1) == _OLD_TORCH:
                return
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                archive.open(entry).close()  # reads its header
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing") from error
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a whole file of torch ({brief(error)})") from error


def _need(folder: Path, *names: str) -> None:
    """Refuse a folder that has none of these files, which stand for the first of them."""
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(f"{folder / names[0]}: is missing")
