"""`Routing(split="auto")`: the split that the saturation measurement recommends on the user's own samples."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from llava_patch.core.errors import HostError, SettingError, brief
from llava_patch.core.files import write_json
from llava_patch.core.paths import VARIABLE, cache_folder
from llava_patch.core.stored import read_object
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements.base import DAMAGED
from llava_patch.measurements.saturation.measure import measure_saturation, unusable
from llava_patch.measurements.saturation.result import DEFAULTS, Saturation, SaturationResult
from llava_patch.patching.handle import get_handle
from llava_patch.patching.keys import digest_of, model_digest
from llava_patch.settings.methods import AUTO, Routing

logger = logging.getLogger("llava_patch")
FORMAT = 4  # of a kept measurement; 2: the model's digest saw matrices only; 3: without VTW's curve
_ASKED = f'Routing.split = "{AUTO}"'
_NOT_MEASURED = ("attention_mask",)  # samples have no padding, so that it does not change what is measured


def resolve_split(
    model: nn.Module,
    routing: Routing,
    samples: Iterable[Mapping[str, Any]] | None,
    settings: Saturation = DEFAULTS,
    progress: bool = True,
) -> Routing:
    """Put a layer number in the place of split = "auto".

    The model is measured as it is, before it is routed, in evaluation mode and without gradients, and nothing on it
    changes. The measurement is kept in the cache folder (see `_measure`), and one line of the log says what was chosen
    and why. A model that already carries a routing keeps its split, and nothing is measured.

    Args:
        model: a model of either host, possibly wrapped; its vision tower must be loaded.
        routing: the settings; returned as they are when their split is a layer number.
        samples: as `measure_saturation` takes them: keyword arguments of the model's forward, each a batch of one
            without padding, on the model's device. Those that are measured are held in memory. Labels say which answers
            must keep; without them it is the token behind the prompt.
        settings: of the measurement; `max_samples` says how many usable samples are taken.
        progress: show a progress bar on stderr while measuring.

    Returns:
        The same settings with an integer split.

    Raises:
        SettingError: no samples, none that can be used, no recommendation, or one that the variant cannot take.
        InputError: a sample that is a batch or padded.
        HostError: the vision tower is not loaded.
    """
    if routing.split != AUTO:
        return routing
    anatomy, handle = find(model), get_handle(model)
    if handle is not None and handle.routing is not None:
        there = handle.routing.split
        logger.warning(
            f"llava_patch: {_ASKED}: the model already carries split {there}, which is kept; nothing is measured"
        )
        return dataclasses.replace(routing, split=there)
    if handle is not None and handle.pruning is not None:
        raise SettingError(
            f"{_ASKED} measures an unpruned model, but this one carries {handle.pruning}: remove the patch first "
            "(handle.remove()), or bind Routing.split to a layer number"
        )
    if samples is None:
        raise SettingError(
            f"{_ASKED} is measured on samples, and here are none: give patch(..., samples=[...]), or run the "
            "`saturation` task on the stock checkpoint and bind Routing.split to the layer that it recommends (LLaVA's "
            "training scripts need neither: they measure on their own data)"
        )
    if anatomy.vision_model is None:
        raise HostError(f"{_ASKED} runs the model, but its vision tower is not loaded yet: call its load_model() first")
    if routing.variant == "vtw" and settings.knockout is False:
        raise SettingError(
            f"{_ASKED} with variant vtw is VTW's own search, which takes the image away at every layer, but "
            "Saturation.knockout = False: leave that out, or bind Routing.split to a layer number"
        )
    result, place = _measure(anatomy, samples, settings, progress)
    vtw = routing.variant == "vtw"
    found = result.vtw if vtw else result.recommend_for(_sees_it_again(routing, result.n_layers))
    split = found.split
    if split is None:
        raise SettingError(
            f"{_ASKED}: {result.samples} samples recommend no split: {found.reason} (curves: {place}); "
            "bind Routing.split to a layer number by hand"
        )
    # A lower split would leave before the image has been read.
    layers, fusion = result.n_layers, routing.fusion_layers
    fusion_start = min(fusion) if isinstance(fusion, tuple) else layers - fusion
    highest = min(fusion_start, layers - routing.side_layers)
    if split > highest:
        raise SettingError(
            f"{_ASKED}: the measurement recommends {split}, but Routing.fusion_layers = {fusion} and "
            f"Routing.side_layers = {routing.side_layers} leave room for 0..{highest} of L = {layers} layers only: "
            "lower them, or bind Routing.split to a layer number by hand"
        )
    assert found.window is not None
    first, last = found.window
    skipped = ", ".join(f"{count} {why}" for why, count in result.skipped.items() if count)
    left_out = f" ({skipped}: left out)" if skipped else ""
    # A warning, so that it is seen where nobody configured logging: the choice decides about the whole run.
    logger.warning(
        f"llava_patch: {_ASKED}: split {split}, the first layer of the window {first}..{last} of L = {layers} layers: "
        f"{found.reason}. Measured on {result.samples} samples{left_out}; curves: {place}. "
        f"Bind Routing.split = {split} to fix it"
    )
    return dataclasses.replace(routing, split=split)


def _sees_it_again(routing: Routing, n_layers: int) -> bool:
    """Whether a routed model's last layer reads the image, as the knock-out of LF has it."""
    fusion = routing.fusion_layers
    return routing.variant == "lf" and (n_layers - 1 in fusion if isinstance(fusion, tuple) else fusion > 0)


def _measure(
    anatomy: Anatomy, samples: Iterable[Mapping[str, Any]], settings: Saturation, progress: bool
) -> tuple[SaturationResult, str]:
    """The measurement, from the cache if it is there, and in words where its file is.

    A file is found again by what decides about the measurement: the model's weights (sampled), the settings in its
    configuration that change the forward pass, a patch that is already on it, the samples, and the settings.
    Floating-point values enter rounded to bfloat16, so that one model loaded in two precisions is one model.
    """
    usable: list[dict[str, Any]] = []
    skipped: dict[str, int] = {}
    for sample in samples:
        if not isinstance(sample, Mapping) or "input_ids" not in sample:
            raise SettingError(
                f"{_ASKED}: sample {len(usable) + sum(skipped.values())} is no dictionary with input_ids: each sample "
                "holds the keyword arguments of the model's forward"
            )
        why_not = unusable(anatomy, dict(sample))
        if why_not is None:
            usable.append(dict(sample))
        else:
            skipped[why_not] = skipped.get(why_not, 0) + 1
        if len(usable) == settings.max_samples:
            break
    if not usable:
        counts = ", ".join(f"{count} with {why}" for why, count in skipped.items()) or "none were given"
        raise SettingError(f"{_ASKED} needs samples with an image and text behind it: {counts}")
    left_out = (*_NOT_MEASURED, "labels") if settings.knockout is False else _NOT_MEASURED
    key = {
        "format": FORMAT,
        "model": model_digest(anatomy),
        "samples": digest_of([{k: v for k, v in s.items() if k not in left_out} for s in usable]),
        "settings": {k: v for k, v in dataclasses.asdict(settings).items() if k != "save_every"},
    }
    path = cache_folder() / f"saturation-{digest_of(key)[:24]}.json"
    kept = _read(path, key, len(anatomy.layers)) if path.is_file() else None
    if kept is not None:
        return kept, f"{path}, measured before"
    result = measure_saturation(anatomy.model, usable, settings, progress)
    result = dataclasses.replace(result, skipped=skipped)
    try:
        write_json(path, {"key": key, "saturation": result.to_dict()})
    except OSError as error:
        logger.warning(
            "llava_patch: the saturation measurement could not be kept (%s): it will be made again next time; set %s "
            "to a folder that can be written",
            error,
            VARIABLE,
        )
    return result, str(path)


def _read(path: Path, key: dict[str, Any], n_layers: int) -> SaturationResult | None:
    """A kept measurement; a damaged file counts as none, with a warning."""
    try:
        kept = read_object(path)
        if kept["key"] != key:
            raise ValueError("it belongs to another model, other samples or other settings")
        result = SaturationResult.from_dict(kept["saturation"])
        if result.n_layers != n_layers:
            raise ValueError(f"it has {result.n_layers} layers, the model {n_layers}")
    except DAMAGED as error:
        reason = f"{type(error).__name__}: {brief(error)}"
        logger.warning("llava_patch: %s cannot be used (%s): measuring again, the file is replaced", path, reason)
        return None
    return result
