"""How routing and pruning attach to a host model."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from llava_patch.core import compiled, registry
from llava_patch.core.errors import SettingError, refuse
from llava_patch.core.method import Method
from llava_patch.core.undo import UndoStack, inner
from llava_patch.hosts import compat, lora, storage
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing import side_branch, tower_hooks
from llava_patch.routing.cache import RoutedCache
from llava_patch.routing.forward import RoutedForward
from llava_patch.routing.pruning import Pruning
from llava_patch.routing.schedule import LayerMode, LayerSchedule, make_schedule
from llava_patch.routing.tower_pruning import TowerPruning
from llava_patch.settings.routing import AUTO, Routing


def attach(anatomy: Anatomy, schedule: LayerSchedule, undo: UndoStack) -> None:
    """Route and prune image tokens of a host model; a schedule that does nothing changes nothing.

    Modifications: the decoder's instance attribute `forward`; with a side branch a ModuleList `side_branch` on the
    decoder; where masks are needed that flash attention does not know (the KV variant, a sliding window), those of
    `compat.allow_any_mask` in the deep layers; on older transformers those of `compat.prepare_layers` and `keep_beams`.
    """
    if not schedule.does_something:
        return
    decoder = anatomy.decoder
    if schedule.side_layers and not hasattr(decoder, side_branch.SIDE_BRANCH):
        layers = [anatomy.layers[schedule.split + i] for i in range(schedule.side_layers)]
        undo.add_module(decoder, side_branch.SIDE_BRANCH, side_branch.copy_layers(layers, anatomy.norm.weight.dtype))
    windowed = compat.sliding_window(decoder.config) is not None
    first = schedule.split if schedule.prune_at is None else min(schedule.split, schedule.prune_at)
    masked = [
        anatomy.layers[i] for i in range(first, schedule.n_layers) if windowed or schedule.modes[i] is LayerMode.KEYS
    ]
    if windowed and schedule.side_layers:
        masked += getattr(decoder, side_branch.SIDE_BRANCH)
    for layer in masked:
        compat.allow_any_mask(layer.self_attn, undo)
    compat.prepare_layers(decoder, [*anatomy.layers, *getattr(decoder, side_branch.SIDE_BRANCH, ())], undo)
    compat.keep_beams(anatomy.model, RoutedCache, undo)
    routed = inner(decoder, "forward")
    if isinstance(routed, RoutedForward):
        undo.set_attribute(routed, "schedule", schedule)
    else:
        refuse(
            {
                "the decoder's forward is compiled already (decoder.forward = torch.compile(...)), and what is routed "
                "would run beside it: patch first, or compile the whole model (torch.compile(model)) or the decoder's "
                "layers": compiled.is_compiled(inspect.unwrap(decoder.forward, stop=compiled.is_compiled))
            }
        )
        undo.set_attribute(decoder, "forward", RoutedForward(anatomy, schedule, undo))


class RoutingMethod(Method):
    """Routing of image tokens on a model; what each layer does is in the schedule, which `attach` carries out."""

    settings: Routing
    calls_decoder_layers = True

    def refused_when_partitioned(self) -> str | None:
        """A measured split."""
        return f'Routing.split = "{AUTO}"' if self.takes_samples() else None

    def takes_samples(self) -> bool:
        """Whether the split is to be measured."""
        return self.settings.split == AUTO

    def measure(self, samples: Any) -> None:
        """Put the layer that the saturation measurement recommends in the place of "auto"."""
        self.settings = registry.load(registry.AUTO_SPLIT)(self.anatomy.model, self.settings, samples)

    def agrees(self, asked: Any) -> bool:
        """What trains may differ from one run to the next."""
        return bool(asked == replace(self.settings, freeze=asked.freeze))

    def parameters(self) -> list[nn.Parameter]:
        """The side branch's."""
        return side_branch.parameters(self.anatomy)

    def freeze(self) -> None:
        """Set requires_grad as `Routing.freeze` says; without a side branch nothing is frozen.

        SettingError: it would freeze peft's LoRA layers, which are there to be trained.
        """
        anatomy, strategy = self.anatomy, self.settings.freeze
        branch = self.parameters()
        if not branch:
            return
        if strategy != "none" and lora.trains(anatomy.model):
            raise SettingError(
                f'Routing.freeze = "{strategy}" would freeze the LoRA layers that peft has put into the model '
                '(--lora_enable True; peft_config): set Routing.freeze = "none", which trains them and the branch, '
                "or leave LoRA out"
            )
        late = make_schedule(self.settings, None, len(anatomy.layers)).late_fusion
        fusion = late if strategy == "side_and_fusion" else ()
        if quantised := [i for i in fusion if storage.quantised_parameters(anatomy.layers[i])]:
            raise SettingError(
                f'Routing.freeze = "{strategy}" would train layer {quantised[0]}, whose weights are quantised: set '
                'Routing.freeze = "all_but_single", which trains the side branch alone, or load the model in 16 bit'
            )
        if strategy != "none":
            anatomy.model.requires_grad_(False)
        for layer in fusion:
            anatomy.layers[layer].requires_grad_(True)
        for parameter in branch:
            parameter.requires_grad_(True)


class PruningMethod(Method):
    """Pruning of image tokens on a model; `routing.attach.attach` applies the schedule that says which layer prunes."""

    settings: Pruning
    calls_decoder_layers = True

    def refused_when_partitioned(self) -> str | None:
        """A pruning that reads a layer's weights before it runs, when they are in parts."""
        return self.name if self.settings.READS_NEXT else None

    def check_together(self, others: Mapping[str, Any]) -> None:
        """Refuse fusions that a pruning by the vision tower cannot look at."""
        if isinstance(self.settings, TowerPruning):
            tower_hooks.check_together(self.settings, others)

    def resolve(self) -> None:
        """Check that the vision tower can be asked, where it is."""
        if isinstance(self.settings, TowerPruning):
            tower_hooks.check_model(self.anatomy, self.settings)

    def attach(self, undo: UndoStack, *, zero_start: bool, loading: bool) -> None:
        """Hook the vision tower where the method looks at it; see `tower_hooks.attach`."""
        if isinstance(self.settings, TowerPruning):
            tower_hooks.attach(self.anatomy, self.settings, undo)
