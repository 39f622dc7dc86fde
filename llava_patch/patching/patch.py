"""`patch(model, ...) -> handle`: every change to a model goes through here, and comes back off it here."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from llava_patch.core import registry
from llava_patch.core.errors import SettingError, SilentFusionWarning
from llava_patch.core.records import CONFIG_KEY
from llava_patch.fusion import attach as fusion_attach
from llava_patch.fusion.taps import injection_layers
from llava_patch.hosts import anatomy as anatomy_module
from llava_patch.hosts import known, wrappers, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.hosts.compat import check_versions
from llava_patch.hosts.handles import HANDLE
from llava_patch.patching.handle import Handle, get_handle, restore_flags
from llava_patch.probe.auxiliary.attach import Auxiliary
from llava_patch.routing import attach as routing_attach
from llava_patch.routing.schedule import make_schedule
from llava_patch.settings.methods import AUTO, FUSIONS, AuxiliaryProbe, DeepStack, FastV, Fusion, Routing, differs


def patch(
    model: nn.Module,
    fusion: Fusion | None = None,
    routing: Routing | None = None,
    pruning: FastV | None = None,
    probe: AuxiliaryProbe | None = None,
    *,
    zero_start: bool = True,
    loading: bool = False,
    samples: Iterable[Mapping[str, Any]] | None = None,
) -> Handle:
    """Apply methods to a LLaVA model, in place.

    Args:
        model: `LlavaLlamaForCausalLM` of the llava package or Hugging Face's `LlavaForConditionalGeneration`; may be
            wrapped by peft, DDP or DeepSpeed.
        fusion: multi-layer vision fusion.
        routing: routing of image tokens around the deep layers.
        pruning: pruning of image tokens, alone or beside any routing variant.
        probe: R-Probe as an auxiliary loss in training.
        zero_start: grow an existing projector so that the output does not change (True), or initialise the widened
            layer as a new one (False: a projector that was made from scratch).
        loading: the model is being built from a patched checkpoint and its weights follow.
        samples: what Routing(split="auto") measures on, see `measurements.saturation.auto_split.resolve_split`.

    Returns:
        The handle; `handle.remove()` restores the model. Patching a patched model again adds what is missing.

    Raises:
        SettingError: settings that the model cannot take, or that contradict a patch already on it.
        HostError: an unknown model, a decoder that what was asked for was not proven on, or an unsupported version.
    """
    for name, value, kinds in (
        ("fusion", fusion, FUSIONS), ("routing", routing, (Routing,)), ("pruning", pruning, (FastV,)),
        ("probe", probe, (AuxiliaryProbe,)),
    ):  # fmt: skip
        if isinstance(value, (tuple, list)):
            raise SettingError(f"patch({name}=...) got {len(value)} settings: a model takes one {name}")
        if value is not None and not isinstance(value, kinds):
            expected = ", ".join(k.__name__ for k in kinds)
            kind = getattr(value, "KIND", None)
            hint = f" (write {kind}=)" if kind not in (None, name) else ""
            if isinstance(value, type):
                hint = f" (an instance: {value.__name__}())"
            raise SettingError(f"patch({name}={value!r}): expected {expected}{hint}")
    _check_together(fusion, routing, probe)
    check_versions()
    found = anatomy_module.find(model)
    if (getattr(found.model, "_tp_size", None) or 1) > 1:
        raise SettingError(
            f"the model runs tensor parallel on {found.model._tp_size} devices (tp_plan), which routing and fusion "
            "cannot follow: load it without tp_plan"
        )
    _check_partitioned(found, fusion, routing, pruning)
    _check_decoder(found, fusion, routing, pruning, probe)
    if fusion is not None and not loading and any(p.is_meta for p in found.projector.parameters()):
        raise SettingError(
            f"the projector's weights lie outside memory (device_map with offloading), where {type(fusion).__name__} "
            "cannot grow them: load the model without offloading, or load a checkpoint that carries the fusion"
        )
    if routing is not None and routing.split == AUTO:
        routing = registry.load(registry.AUTO_SPLIT)(found.model, routing, samples)
    elif samples is not None:
        raise SettingError('patch(samples=...) is what Routing(split="auto") measures on, which was not asked for')
    handle = get_handle(found.model)
    if handle is None:
        handle = Handle(found.model, found)
    else:
        _check_against(handle, fusion, routing, pruning, probe)
        handle._began = handle._mark()
        handle._undo.push(restore_flags(found.model))
    try:
        taps = fusion_attach.resolve(found, fusion) if fusion is not None and handle.fusion is None else handle.taps
        injections = injection_layers(handle.fusion or fusion, taps)
        program = make_schedule(handle.routing or routing, handle.pruning or pruning, len(found.layers), injections)
        if not handle._carries and program.does_something:
            wrappers.attach(found, handle._undo)
            handle._carries = True
        if fusion is not None and handle.fusion is None:
            assert taps is not None
            fusion_attach.attach(found, fusion, taps, handle._undo, zero_start=zero_start, loading=loading)
            handle.fusion, handle.taps = fusion, taps
        elif fusion is not None and fusion != handle.fusion:  # another choice of what trains
            assert handle.fusion is not None
            if handle.fusion.train_tower == "frozen":
                fusion_attach.let_tower_train(found, fusion, handle._undo)
            handle.fusion = fusion
        routing_attach.attach(found, program, handle._undo)
        if program.does_something:  # last: a fusion may have put another projector there
            wrappers.watch(found, handle._undo)
        handle.routing, handle.pruning = routing or handle.routing, pruning or handle.pruning
        _check_together(handle.fusion, handle.routing, probe or handle.probe)
        if handle.fusion is not None and handle.fusion.train_tower != "frozen":
            handle.trained_tower = True
        if any(s is not None for s in (handle.fusion, handle.routing, handle.pruning)):
            handle._undo.set_attribute(found.model.config, CONFIG_KEY, handle.record())
        if not loading:
            handle.apply_freeze()
        handle._undo.set_attribute(found.model, HANDLE, handle)
        if probe is not None and handle.auxiliary is None:  # last: its head follows what the fusion does
            auxiliary = Auxiliary(found, probe, handle.tokens_per_image)
            auxiliary.attach(handle._undo)
            handle.auxiliary = auxiliary
    except BaseException:
        handle._back_to(handle._began)
        raise
    if not loading and (fusion or routing) is not None and (problem := handle.silent_fusion()):
        warnings.warn(problem, SilentFusionWarning, stacklevel=2)
    return handle


def _check_decoder(
    found: Anatomy,
    fusion: Fusion | None,
    routing: Routing | None,
    pruning: FastV | None,
    probe: AuxiliaryProbe | None,
) -> None:
    """Refuse decoders that nothing of what calls decoder layers was proven on; other fusions leave them alone."""
    asked = (routing, pruning, probe, fusion if isinstance(fusion, DeepStack) else None)
    names = [type(settings).__name__ for settings in asked if settings is not None]
    if names:
        known.check_decoder(found.decoder, " and ".join(names))


def _check_partitioned(found: Anatomy, fusion: Fusion | None, routing: Routing | None, pruning: FastV | None) -> None:
    """Refuse what cannot be done with weights that DeepSpeed ZeRO-3 has partitioned."""
    if not zero.is_partitioned(found.model.parameters()):
        return
    asked = None
    if routing is not None and routing.split == AUTO:
        asked = f'Routing.split = "{AUTO}"'
    elif routing is not None and routing.variant == "kv":
        asked = 'Routing.variant = "kv"'  # calls projections apart from their layers, in another order without an image
    elif pruning is not None and pruning.training:
        asked = "FastV.training = True"
    if asked is not None:
        raise SettingError(
            f"the model's weights are partitioned by DeepSpeed ZeRO-3 (--deepspeed with stage 3), where fusions "
            f"and routing are available but {asked} is not: use stage 2 (LLaVA's scripts/zero2.json)"
        )
    if zero.in_engine(found.model):
        raise SettingError(
            "DeepSpeed's ZeRO-3 engine has already taken this model over and would not train what a patch adds: patch "
            "the model before deepspeed.initialize()"
        )


def _check_together(fusion: Fusion | None, routing: Routing | None, probe: AuxiliaryProbe | None) -> None:
    if probe is not None and probe.weight and routing is not None and routing.freeze != "none":
        raise SettingError(
            f'Routing.freeze = "{routing.freeze}" freezes the projector and the vision tower, so that AuxiliaryProbe '
            'would train nothing but its own head: set Routing.freeze = "none", or leave AuxiliaryProbe out'
        )
    if fusion is not None and routing is not None and fusion.train_tower != "frozen" and routing.freeze != "none":
        raise SettingError(
            f"{type(fusion).__name__}.train_tower = {fusion.train_tower!r} contradicts Routing.freeze = "
            f'"{routing.freeze}", which freezes the vision tower: set train_tower = "frozen" or Routing.freeze = "none"'
        )


def _check_against(
    handle: Handle, fusion: Fusion | None, routing: Routing | None, pruning: FastV | None, probe: AuxiliaryProbe | None
) -> None:
    for name, asked, there in (
        ("fusion", fusion, handle.fusion), ("routing", routing, handle.routing), ("pruning", pruning, handle.pruning),
        ("probe", probe, handle.probe),
    ):  # fmt: skip
        if isinstance(asked, Routing) and isinstance(there, Routing):  # what trains may differ from one run to the next
            there = dataclasses.replace(there, freeze=asked.freeze)
        if isinstance(asked, Fusion) and isinstance(there, Fusion) and not differs(asked, there):
            continue
        if name == "fusion" and asked is not None and there is None and handle.auxiliary is not None:
            raise SettingError(
                "a fusion under an auxiliary loss that is there already would change what its head was made for: give "
                "both to one call of patch"
            )
        if asked is not None and there is not None and asked != there:
            raise SettingError(
                f"the model already carries {name} {there}, but {asked} was asked for: remove the patch first "
                "(handle.remove()), or ask for what the checkpoint was trained with (in a launch script: leave the "
                "binding out, the checkpoint carries its own)"
            )
