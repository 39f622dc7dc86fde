"""`patch(model, ...) -> handle`: every change to a model goes through here, and comes back off it here."""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from llava_patch.core import compiled, registry
from llava_patch.core.errors import SettingError, SilentFusionWarning
from llava_patch.core.method import Method
from llava_patch.core.records import CONFIG_KEY
from llava_patch.hosts import anatomy as anatomy_module
from llava_patch.hosts import graphs, known, wrappers, zero
from llava_patch.hosts.anatomy import HANDLE, Anatomy, when_loaded
from llava_patch.hosts.compat import check_versions, load_saved_names
from llava_patch.patching.handle import Handle, get_handle, one_at_a_time, refuse_copy, restore_flags
from llava_patch.routing import attach as decoder

if TYPE_CHECKING:
    from llava_patch.fusion.base import Fusion
    from llava_patch.routing.pruning import Pruning
    from llava_patch.settings.methods import AuxiliaryProbe, Routing


def patch(
    model: nn.Module,
    fusion: "Fusion | None" = None,
    routing: "Routing | None" = None,
    pruning: "Pruning | None" = None,
    probe: "AuxiliaryProbe | None" = None,
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
    asked = _methods({"fusion": fusion, "routing": routing, "pruning": pruning, "probe": probe})
    check_versions()
    with one_at_a_time(anatomy_module.unwrap(model)):
        handle = _patch(model, asked, samples, zero_start, loading)
    new_weights = fusion is not None or routing is not None
    if new_weights and not loading and (problem := handle.silent_fusion()):
        warnings.warn(problem, SilentFusionWarning, stacklevel=2)
    return handle


def _patch(
    model: nn.Module,
    asked: Mapping[str, Method],
    samples: Iterable[Mapping[str, Any]] | None,
    zero_start: bool,
    loading: bool,
) -> Handle:
    found = anatomy_module.find(model)
    for method in asked.values():
        method.anatomy = found
    _check_model(found, asked, loading)
    takers = [method for method in asked.values() if method.takes_samples()]
    if samples is not None and not takers:
        raise SettingError(f"patch(samples=...) is what {registry.MEASURED} measures on, which was not asked for")
    for method in takers:  # what their settings leave open
        method.measure(samples)
    handle = get_handle(found.model)
    if handle is None:
        handle = Handle(found.model, found)
    else:
        _check_against(handle, asked)
        handle._began = handle._mark()
        handle._undo.push(restore_flags(found.model))
    try:
        _apply(handle, asked, zero_start, loading)
    except BaseException:
        handle._back_to(handle._began)
        raise
    return handle


def _methods(given: Mapping[str, Any]) -> dict[str, Method]:
    """What carries out the settings that were given, by kind."""
    asked: dict[str, Method] = {}
    for kind, value in given.items():
        if value is None:
            continue
        if isinstance(value, (tuple, list)):
            raise SettingError(f"patch({kind}=...) got {len(value)} settings: a model takes one {kind}")
        known_settings = registry.methods(kind)
        if not isinstance(value, tuple(known_settings.values())):
            its_kind = getattr(value, "KIND", None)
            hint = f" (write {its_kind}=)" if its_kind not in (None, kind) else ""
            if isinstance(value, type):
                hint = f" (an instance: {value.__name__}())"
            raise SettingError(f"patch({kind}={value!r}): expected {', '.join(known_settings)}{hint}")
        asked[kind] = registry.load(registry.KINDS[kind])(value)
    _check_together(asked)
    return asked


def _check_together(methods: Mapping[str, Method]) -> None:
    settings = {kind: method.settings for kind, method in methods.items()}
    for method in methods.values():
        method.check_together(settings)


def _check_model(found: Anatomy, asked: Mapping[str, Method], loading: bool) -> None:
    """Refuse a model that what is asked for cannot be put on."""
    if (getattr(found.model, "_tp_size", None) or 1) > 1:
        raise SettingError(
            f"the model runs tensor parallel on {found.model._tp_size} devices (tp_plan), which routing and fusion "
            "cannot follow: load it without tp_plan"
        )
    if zero.is_partitioned(found.model.parameters()):
        for setting in (method.refused_when_partitioned() for method in asked.values()):
            if setting is not None:
                raise SettingError(
                    f"the model's weights are partitioned by DeepSpeed ZeRO-3 (--deepspeed with stage 3), where "
                    f"fusions and routing are available but {setting} is not: use stage 2 (LLaVA's scripts/zero2.json)"
                )
        if zero.in_engine(found.model):
            raise SettingError(
                "DeepSpeed's ZeRO-3 engine has already taken this model over and would not train what a patch adds: "
                "patch the model before deepspeed.initialize()"
            )
    names = [method.name for method in asked.values() if method.calls_decoder_layers]
    if names:
        known.check_decoder(found.decoder, " and ".join(names))
    for method in asked.values():
        method.check_model(loading)


def _check_against(handle: Handle, asked: Mapping[str, Method]) -> None:
    """Refuse what contradicts a patch that is on the model already."""
    for kind, method in asked.items():
        there = handle.methods.get(kind)
        if there is None:
            method.check_added(handle.methods)
        elif not there.agrees(method.settings):
            raise SettingError(
                f"the model already carries {kind} {there.settings}, but {method.settings} was asked for: remove the "
                "patch first (handle.remove()), or ask for what the checkpoint was trained with (in a launch script: "
                "leave the binding out, the checkpoint carries its own)"
            )


def _apply(handle: Handle, asked: Mapping[str, Method], zero_start: bool, loading: bool) -> None:
    """Change the model. The order counts: a fusion may put another projector there, an auxiliary loss copies layers."""
    found, undo, there = handle.anatomy, handle._undo, handle.methods
    new = {kind: method for kind, method in asked.items() if kind not in there}
    handle.methods = {kind: {**there, **new}[kind] for kind in registry.KINDS if kind in there or kind in new}
    for method in new.values():
        method.resolve()
    program = handle.program()
    if new and not there:
        graphs.attach(found, undo)
        for part in (found.wrapper, found.decoder):
            undo.set_attribute(part, "__reduce_ex__", refuse_copy)
        when_loaded(found, undo, lambda late: late.set_attribute(found.vision_model, "__reduce_ex__", refuse_copy))
    if program.does_something and not handle._carries:
        wrappers.attach(found, undo)
        handle._carries = True
    for kind, method in asked.items():
        if kind in new and kind not in registry.TRAINING_ONLY:
            method.attach(undo, zero_start=zero_start, loading=loading)
        elif kind in there and method.settings != there[kind].settings:
            handle.methods[kind] = there[kind].changed(method.settings, undo)
    decoder.attach(found, program, undo)
    if program.does_something:  # after the fusion: it may have put another projector there
        wrappers.watch(found, undo)
    _check_together(handle.methods)
    handle.trained_tower |= any(method.trains_tower for method in handle.methods.values())
    if any(kind not in registry.TRAINING_ONLY for kind in handle.methods):
        undo.set_attribute(found.model.config, CONFIG_KEY, handle.record())
    if not loading:
        handle.apply_freeze()
    if HANDLE not in vars(found.model):
        load_saved_names(found.model, undo)
    undo.set_attribute(found.model, HANDLE, handle)
    undo.set_attribute(found.model, "__reduce_ex__", refuse_copy)
    compiled.forget()
    for kind, method in new.items():
        if kind in registry.TRAINING_ONLY:
            method.attach(undo, zero_start=zero_start, loading=loading)
