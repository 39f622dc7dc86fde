"""Loads the model that a command measures, and the base that it is compared with: of either host, patched or not."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llava_patch.core import memory, parallel, records
from llava_patch.core.errors import CheckpointError, HostError, LlavaPatchError, MissingExtraError, SettingError, brief
from llava_patch.core.finite import DIVERGED, first_not_finite
from llava_patch.core.hub import adapter_folder, is_path
from llava_patch.core.memory import float32_default
from llava_patch.core.weights import check_headers, lacks_config, locate, read_json
from llava_patch.data.inputs import Inputs
from llava_patch.hosts import compat, configs
from llava_patch.hosts.anatomy import LLAVA, find
from llava_patch.hosts.host import is_computed, named_weights

if TYPE_CHECKING:
    from llava_patch.data.target import ModelInputs

DTYPES = ("float32", "bfloat16", "float16")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_LORA, _PROJECTOR = "adapter_config.json", "mm_projector.bin"


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint:
    """A model ready to be measured."""

    model: Any  # in evaluation mode, with the patch that its checkpoint carries or that gin asks for
    tokenizer: Any
    image_processor: Any  # turns PIL images into pixel values
    processor: Any = None  # HF's joint processor; None on `llava`

    def inputs(self) -> Inputs:
        """Makes the model's inputs of an image and a question."""
        return Inputs(find(self.model), self.tokenizer, self.image_processor, self.processor)

    def samples(
        self, data: str = "", count: int | None = None, question: str = "", answers: bool = False
    ) -> "ModelInputs":
        """Keyword arguments of the model's forward for examples, one at a time: what the measurements take.

        Args:
            data: as `read_examples` takes it; "": pages that are rendered at the size of the vision tower.
            count: how many at most, spread over the data; None: all (32 rendered pages).
            question: asked about every image; "": the data's own.
            answers: with the answers, which must be known, and `labels` for the loss.

        Raises:
            InputError: nothing usable there; names the file.
        """
        from llava_patch.data.target import ModelInputs, examples_for

        return ModelInputs(self, examples_for(self, data, count, question, answers), answers)


def load_subject(checkpoint: str, base: str = "", device: str = "", dtype: str = "") -> LoadedCheckpoint:
    """Load a checkpoint with its host's own loader, chosen by what its config.json says.

    A LLaVA checkpoint goes through `load_pretrained_model`, which reads weights in float16 and is then cast; patches
    are recognised by the package's hooks in `from_pretrained`.

    Args:
        checkpoint: folder or hub name: a full checkpoint of either host, stock or patched; an adapter of llava_patch; a
            LoRA or projector-only checkpoint of llava (then with `base`).
        base: the model under such a checkpoint; under an adapter of llava_patch, the one that its record names unless
            given.
        device: "cpu", "cuda" (the process's own one), "cuda:N"; "": cuda where there is one.
        dtype: one of `DTYPES`; "": float32 on CPU (bfloat16 where the machine's memory does not hold that, which is
            said), float16 elsewhere.

    Raises:
        CheckpointError: no checkpoint, a damaged one, one of another model or whose weights are not finite, or one
            that needs `base` or must not have it.
        HostError: the llava package, whose checkpoint it is, is not installed.
        SettingError: a device or dtype that is not there, or weights that this machine's memory cannot hold.
    """
    place, number = pick_device(device), pick_dtype(dtype, pick_device(device))
    files = configs.read(checkpoint)
    if base and read_json(base, "config.json") is None:  # it may be a language model alone
        raise lacks_config(base, f"--base {base}")
    below = base or (records.base_of(files.source, files.record or {}) if files.is_adapter else "")
    if place == "cpu":
        number = memory.cpu_dtype(dtype, below or checkpoint) or number
    load = _load_llava if files.host == LLAVA else _load_hf
    given: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if base and files.is_adapter:
        given, base = records.base_is(files.source, base), ""
    with float32_default(), given:
        check_headers(below or checkpoint)
        try:
            found = load(files, base, place, number)
        except LlavaPatchError:
            raise
        except ImportError as error:
            raise MissingExtraError(f"{checkpoint} cannot be loaded: a package is missing ({brief(error)})") from error
        except Exception as error:  # damaged files raise whatever the host's code meets first
            if isinstance(error, MemoryError) or "memory" in str(error).lower() or "CUDA" in str(error):
                raise
            raise CheckpointError(
                f"{checkpoint} cannot be loaded ({type(error).__name__}: {brief(error)}): look at it with llava-patch "
                f"inspect {checkpoint}, or copy or download its files again"
            ) from error
    if (broken := first_not_finite(named_weights(find(found.model)))) is not None:
        raise CheckpointError(f"{checkpoint}: {broken} holds NaN or infinity: {DIVERGED}")
    found.model.eval()
    return found


def base_of(checkpoint: str, given: str, setting: str) -> str:
    """The base to compare a checkpoint with: the one that was `given`, or the one that its record names.

    CheckpointError: none is known, or it is not there; `setting` says how to name one ("BASE", "Drift.base").
    """
    if given:
        configs.read(given, f"{setting} {given}")
        return given
    folder = adapter_folder(checkpoint)
    record = records.read_settings(folder) if Path(folder).is_dir() else None
    named = (record or {}).get("base")
    if record is not None and named:
        named = records.find_base(folder, record) or named
    if not named:
        why = "it is no adapter of llava_patch, so it names no base" if record is None else "its record names no base"
        raise CheckpointError(f"{checkpoint}: {why}: say with {setting} what to compare it with")
    if not Path(named).is_dir() and is_path(named):
        raise CheckpointError(
            f"{checkpoint}: its record names {named} as its base, and there is no such folder here: say with {setting} "
            "where it is"
        )
    try:
        configs.read(named)
    except CheckpointError as error:  # LLaVA's training starts from a language model alone
        raise CheckpointError(
            f"{checkpoint}: its record names {named} as its base, which is no LLaVA with a vision tower and projector "
            f"of its own: say with {setting} what to compare it with"
        ) from error
    return str(named)


def load_base(name: str, device: str = "", dtype: str = "") -> LoadedCheckpoint:
    """Load a base as its checkpoint is, without the patch that gin asks for on the checkpoint's side."""
    from llava_patch.settings import active

    with active.without_patches():
        return load_subject(name, device=device, dtype=dtype)


def pick_device(name: str) -> str:
    """The device that a command runs on, as torch names it; a SettingError where it is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda") or (name != "cpu" and not torch.cuda.is_available()):
        raise SettingError(f"--device {name}: expected cpu, or cuda or cuda:N on a machine that has one")
    return f"cuda:{parallel.local_rank()}" if name == "cuda" else name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """The precision that a command runs the model in; a SettingError for what is not one of `DTYPES`."""
    name = name or ("float32" if device == "cpu" else "float16")
    if name not in DTYPES:
        raise SettingError(f"--dtype {name}: expected {', '.join(DTYPES)}")
    return getattr(torch, name)


def _load_llava(files: configs.CheckpointFiles, base: str, device: str, dtype: torch.dtype) -> LoadedCheckpoint:
    checkpoint = files.source
    try:
        with _interrupted_afterwards():
            from llava.model.builder import load_pretrained_model
    except ImportError as error:
        raise HostError(
            f"{checkpoint} is a checkpoint of the llava package, which cannot be imported ({error}): "
            "pip install --no-deps llava-torch"
        ) from error
    whole = _is_whole(files)
    lora = not whole and locate(checkpoint, _LORA) is not None
    if not whole and not lora and locate(checkpoint, _PROJECTOR) is None:
        raise CheckpointError(f"{checkpoint}: it holds no weights ({', '.join((*_WEIGHTS, _LORA, _PROJECTOR))})")
    if whole and base:
        raise CheckpointError(f"{checkpoint} is whole, or knows its own base: leave out --base")
    if not whole and not base:
        what = "LoRA weights" if lora else "a projector"
        raise CheckpointError(f"{checkpoint} holds {what} only: name the model below it with --base")
    # llava's loader decides by the name that it is given.
    name = "llava" + "-lora" * lora + "-mistral" * (files.config.get("model_type") == "llava_mistral")
    places = {"device_map": device, "device": device}
    tokenizer, model, images, _ = load_pretrained_model(checkpoint, base or None, name, **places)
    return LoadedCheckpoint(model.to(dtype), tokenizer, images)


def _is_whole(files: configs.CheckpointFiles) -> bool:
    return files.is_adapter or any(locate(files.source, name) for name in _WEIGHTS)


def is_part(checkpoint: str) -> bool:
    """Whether a checkpoint must be told the model below it.

    It is one of llava that holds LoRA weights or a projector only, or an adapter whose base is not where it was.
    """
    files = configs.look(checkpoint)
    if files.is_adapter:
        return records.find_base(files.source, files.record or {}) is None
    return files.host == LLAVA and not _is_whole(files)


@contextlib.contextmanager
def _interrupted_afterwards() -> Iterator[None]:
    """Hold Ctrl-C back until the block is over: llava's package swallows it among its imports and is broken then."""
    main = threading.current_thread() is threading.main_thread()
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number)) if main else None
    try:
        yield
    finally:
        if main:
            signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


def _load_hf(files: configs.CheckpointFiles, base: str, device: str, dtype: torch.dtype) -> LoadedCheckpoint:
    import transformers

    checkpoint = files.source
    if base:
        raise CheckpointError(f"{checkpoint} is a checkpoint of Hugging Face's LLaVA: leave out --base")
    kinds = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
    kind: Any = getattr(transformers, f"{kinds[files.config['model_type']]}ForConditionalGeneration")
    model, info = kind.from_pretrained(checkpoint, output_loading_info=True, **compat.dtype_argument(dtype))
    if missing := sorted(name for name in info["missing_keys"] if not is_computed(name)):
        raise CheckpointError(
            f"{checkpoint}: tensor {missing[0]} is missing ({len(missing)} in all), which transformers would make up: "
            "copy or download its weights again"
        )
    processor: Any = transformers.AutoProcessor.from_pretrained(checkpoint)
    return LoadedCheckpoint(model.to(device), processor.tokenizer, processor.image_processor, processor)
