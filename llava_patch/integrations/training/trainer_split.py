"""`Routing(split="auto")` in LLaVA's training scripts: samples of the Trainer's own data, one answer for all ranks."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from llava_patch.core import parallel
from llava_patch.core.errors import SettingError
from llava_patch.core.records import read_settings
from llava_patch.core.undo import UndoStack
from llava_patch.hosts import zero
from llava_patch.hosts.anatomy import find
from llava_patch.integrations.training.trainer_folder import newest_whole
from llava_patch.measurements.saturation.auto_split import logger, resolve_split
from llava_patch.measurements.saturation.result import Saturation
from llava_patch.patching.handle import get_handle
from llava_patch.settings.methods import Routing, from_record

SAMPLES = 32
"""Samples taken when Saturation.max_samples is not bound."""
_TRIES = 100
"""Items read for each sample wanted, before data with hardly any image is given up."""


def resolve_for_training(
    model: nn.Module,
    routing: Routing,
    arguments: TrainingArguments,
    dataset: Any,
    collator: Callable[[list[Any]], dict[str, Any]] | None,
    settings: Saturation,
) -> Routing:
    """`resolve_split` at the moment the Trainer is made.

    The first rank decides and tells the others, so that all of them build the same model whatever their hardware. A
    run that is resumed keeps the split of the checkpoint it goes on from, also when data or settings have changed. Of
    the data only the items that are tried are read. SettingError: as `resolve_split`, on every rank; or data that have
    no length.
    """
    device = arguments.device  # this also joins the ranks

    def resolve() -> Routing:
        if zero.is_partitioned(model.parameters()):
            raise SettingError(
                'Routing.split = "auto" is not measured on weights that DeepSpeed ZeRO-3 has partitioned: use stage 2 '
                "(LLaVA's scripts/zero2.json), or bind Routing.split to a layer number"
            )
        handle = get_handle(model)
        if handle is not None and handle.routing is not None:
            return resolve_split(model, routing, None)
        resumed = _resumed_split(arguments)
        if resumed is not None:
            return dataclasses.replace(routing, split=resumed)
        chosen = dataclasses.replace(settings, max_samples=settings.max_samples or SAMPLES)
        samples = _samples(dataset, collator, device, _TRIES * (chosen.max_samples or SAMPLES))
        # Mixed precision as the Trainer's: LLaVA hands over a model in bfloat16 with a new projector in float32.
        dtype = torch.bfloat16 if arguments.bf16 else torch.float16
        mixed = torch.autocast(device.type, dtype=dtype, enabled=bool(arguments.bf16 or arguments.fp16))
        with _on_device(find(model).model, device), mixed:
            return resolve_split(model, routing, samples, chosen)

    return _on_first_rank(resolve)


def _resumed_split(arguments: TrainingArguments) -> int | None:
    """The split of the checkpoint that LLaVA's scripts resume from; None when the run is new."""
    folder = arguments.output_dir
    last = newest_whole(Path(folder)) if folder else None
    record = None if last is None else read_settings(last)
    found = None if record is None else from_record(record, str(last)).get("routing")
    if found is None:
        return None
    logger.warning(
        'llava_patch: Routing.split = "auto": the run resumes from %s with split %s, which is kept', last, found.split
    )
    return int(found.split)


def _samples(
    dataset: Any, collator: Callable[[list[Any]], dict[str, Any]] | None, device: torch.device, tries: int
) -> Iterator[dict[str, Any]]:
    """Batches of one, in an order that is spread over the data and the same in every run, whatever its seed."""
    from accelerate.utils import send_to_device

    if collator is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise SettingError(
            'Routing.split = "auto" takes samples of the training data by index, but the Trainer got '
            f"{type(dataset).__name__} and data_collator = {collator!r}: bind Routing.split to a layer number"
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:tries].tolist()
    for index in order:
        batch = collator([dataset[index]])
        # A batch of one has no padding; LLaVA's mask also hides unknown words, which share their id with padding.
        yield send_to_device({k: v for k, v in batch.items() if k != "attention_mask"}, device)


@contextlib.contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model where the Trainer will put it; LLaVA's scripts hand it over with only its tower there."""
    with UndoStack() as undo:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device != device:
                undo.push(functools.partial(setattr, tensor, "data", tensor.data))
                tensor.data = tensor.data.to(device)
        yield


def _on_first_rank(work: Callable[[], Routing]) -> Routing:
    """Do something on rank 0 and give every rank its result; its error reaches every rank too."""
    if parallel.world() == 1:
        return work()
    outcome: list[Any] = [None, None]
    failure: BaseException | None = None
    if parallel.rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            failure, outcome[1] = error, str(error)
    torch.distributed.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise SettingError(outcome[1])
    return outcome[0]
