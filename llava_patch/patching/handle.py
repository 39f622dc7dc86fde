"""What `patch` returns: what is applied to a model, what trains, and how it comes off again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from llava_patch.core.errors import LlavaPatchError, SettingError
from llava_patch.core.records import FORMAT
from llava_patch.core.undo import UndoStack
from llava_patch.fusion import attach as fusion_attach
from llava_patch.fusion import optimizer as fusion_optimizer
from llava_patch.fusion import processor as fusion_processor
from llava_patch.fusion.taps import Taps, injection_layers
from llava_patch.fusion.warm_up import WarmUp, steps_of
from llava_patch.hosts import call_context, handles, lora, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.routing import attach as routing_attach
from llava_patch.routing import side_branch
from llava_patch.routing.schedule import LayerSchedule, make_schedule
from llava_patch.settings.methods import AuxiliaryProbe, FastV, Fusion, Routing, to_dict

if TYPE_CHECKING:
    from llava_patch.probe.auxiliary.attach import Auxiliary


class _Mark(NamedTuple):
    """Where one call of `patch` began."""

    steps: int
    fusion: Fusion | None
    routing: Routing | None
    pruning: FastV | None
    taps: Taps | None
    trained_tower: bool
    carries: bool
    auxiliary: Auxiliary | None


class Handle:
    """A patched model's handle: what was applied, what trains, how to save it and how to take it off.

    Attributes:
        model: the patched causal LM.
        anatomy: where its parts are.
        fusion: settings of a fusion, or None.
        routing: routing settings, or None.
        pruning: pruning settings, or None.
        taps: the blocks that the fusion taps on this tower, or None.
        trained_tower: whether the vision tower's weights are not the original ones: something in it trains, or did in
            an earlier run.
        auxiliary: R-Probe as an auxiliary loss, or None.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Use `patch`, not this."""
        self.model = model
        self.anatomy = anatomy
        self.fusion: Fusion | None = None
        self.routing: Routing | None = None
        self.pruning: FastV | None = None
        self.taps: Taps | None = None
        self.trained_tower = False
        self.auxiliary: "Auxiliary | None" = None
        self._undo = UndoStack()
        self._undo.push(restore_flags(model))
        self.active = True
        self._carries = False
        self._began = self._mark()
        self._entered: list[_Mark] = []

    def _mark(self) -> _Mark:
        return _Mark(
            len(self._undo), self.fusion, self.routing, self.pruning, self.taps, self.trained_tower, self._carries,
            self.auxiliary,
        )  # fmt: skip

    def _back_to(self, mark: _Mark) -> None:
        """Take back what was applied since; everything when the mark is the beginning."""
        if mark.steps <= 1:  # the flags alone
            self.remove()
        elif self.active:
            self._undo.unwind(to=mark.steps)
            _, self.fusion, self.routing, self.pruning, self.taps, self.trained_tower, self._carries, auxiliary = mark
            self.auxiliary = auxiliary

    def __deepcopy__(self, memo: dict[int, Any]) -> "Handle":
        """Refused: the copy's methods would still run the original's weights."""
        raise LlavaPatchError(
            "a patched model cannot be copied: call handle.remove() first and patch the copy, or save the patch and "
            "load it twice"
        )

    def __enter__(self) -> "Handle":
        """Use the patch inside a `with` block; what the block's own `patch` added is taken off at its end."""
        self._entered.append(self._began)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the patch off, also after an exception."""
        self._back_to(self._entered.pop())

    def __repr__(self) -> str:
        """Name what is applied."""
        parts = [str(s) for s in (self.fusion, self.routing, self.pruning, self.probe) if s is not None]
        removed = "" if self.active else " (removed)"
        return f"<llava_patch on {type(self.model).__name__}: {', '.join(parts) or 'nothing'}{removed}>"

    @property
    def probe(self) -> AuxiliaryProbe | None:
        """Settings of the auxiliary loss, or None."""
        return None if self.auxiliary is None else self.auxiliary.settings

    def settings(self) -> dict[str, Any]:
        """The applied settings as JSON values, as a run's llava_patch.json records them."""
        return self.record() | ({} if self.probe is None else {"probe": to_dict(self.probe)})

    def record(self) -> dict[str, Any]:
        """What a checkpoint's config holds: all that its finished model needs, so not the auxiliary loss."""
        return {
            "format": FORMAT,
            "fusion": None if self.fusion is None else to_dict(self.fusion),
            "routing": None if self.routing is None else to_dict(self.routing),
            "pruning": None if self.pruning is None else to_dict(self.pruning),
            **({"trained_tower": True} if self.trained_tower else {}),
        }

    def remove(self) -> None:
        """Restore the stock model: modules, instance attributes, hooks, config and requires_grad flags.

        What was trained is lost unless it was saved. Can be called twice. After loading a fused checkpoint there is no
        stock projector to go back to: its first layer keeps the main columns.
        """
        if not self.active:
            return
        self.active = False
        self._undo.unwind()

    def apply_freeze(self) -> None:
        """Set requires_grad as the settings say; call it after a training script has set its own flags.

        Raises:
            SettingError: a freeze strategy that would freeze peft's LoRA layers, which are there to be trained.
        """
        if self.routing is not None and side_branch.parameters(self.anatomy):
            if self.routing.freeze != "none" and lora.trains(self.model):
                raise SettingError(
                    f'Routing.freeze = "{self.routing.freeze}" would freeze the LoRA layers that peft has put into the '
                    'model (--lora_enable True): set Routing.freeze = "none", which trains them and the side branch, '
                    "or leave LoRA out"
                )
            routing_attach.freeze(self.anatomy, self.routing, self.program())
        if self.fusion is not None and self.taps is not None:
            fusion_attach.set_tower_flags(self.anatomy, self.fusion, self.taps)

    def program(self) -> LayerSchedule:
        """What each decoder layer does under the applied settings."""
        injections = injection_layers(self.fusion, self.taps)
        return make_schedule(self.routing, self.pruning, len(self.anatomy.layers), injections)

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image (or tile) becomes in the decoder, line ends of anyres apart."""
        tower_grid = self.anatomy.grid
        if self.taps is not None and not self.taps.keeps_tokens:
            return self.taps.tokens(tower_grid)
        extra = (
            0
            if self.anatomy.drops_cls or self.anatomy.vision_model is None
            else self.anatomy.vision_parts().prefix_tokens
        )
        return tower_grid[0] * tower_grid[1] + extra

    def fit_processor(self, processor: Any) -> None:
        """Make HF's `LlavaProcessor` write as many image placeholders as the fused model has tokens, in place.

        Needed with merge_size = 2 and DenseConnector(kind="sti"); a checkpoint that `save` writes holds it already.
        """
        if self.anatomy.ids_hold_places and self.taps is not None:
            fusion_processor.fit(processor, self.anatomy, self.taps)

    def image_positions(
        self, image_mask: Tensor | None = None, kept: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Tell the model where the images are in the next call, for embeddings that were merged by hand.

        For chunked prefill as well, where a chunk's embeddings come without pixels.

        Args:
            image_mask: bool [batch, tokens] of the next call's tokens, or of all tokens so far; None: as the host says.
            kept: bool of the same shape, positions that pruning keeps, to repeat an earlier choice; None: choose.

        Returns:
            A context manager for one call of the model.
        """
        if not self.program().does_something:
            return contextlib.nullcontext()  # the stock model does not ask
        return call_context.placed(self.anatomy, image_mask, kept)

    def trainable(self) -> list[str]:
        """Names of the parameters that a training step gives a gradient, in the model's order."""
        unused: set[int] = set()
        lifted = self.fusion is not None and self.fusion.train_tower != "frozen"
        if self.anatomy.tower_apart and not lifted:
            unused = {id(p) for p in self.anatomy.tower.parameters()}  # llava runs its tower under no_grad
        elif self.anatomy.vision_model is not None:
            deepest = self.anatomy.main_block if self.taps is None else self.taps.deepest
            unused = {id(p) for p in self.anatomy.vision_parts().unused(deepest)}
        return [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in unused]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Parameters between the vision tower and the decoder: the projector's, and DeepStack's second projector's."""
        return [*self.anatomy.projector.parameters(), *fusion_attach.parameters(self.anatomy)]

    def _head_parameters(self) -> list[nn.Parameter]:
        head = None if self.auxiliary is None else self.auxiliary.head
        return [] if head is None else list(head.parameters())

    def param_groups(
        self, lr: float, weight_decay: float = 0.0, projector_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Optimizer groups of everything that trains, for a training loop of your own.

        `optimizer = torch.optim.AdamW(handle.param_groups(1e-5, weight_decay=0.05))`. The fusion's `tower_lr` and
        `layer_decay` are in the groups; LLaVA's own trainer gets them without this. A scheduler that multiplies each
        group's learning rate keeps their ratios. With `unfreeze_after`, see `warm_up`.

        Args:
            lr: learning rate of what has no other.
            weight_decay: of matrices; biases, norms and other vectors have none, much as in Hugging Face's Trainer.
            projector_lr: learning rate of the projector (LLaVA's --mm_projector_lr); None: `lr`.

        Returns:
            Groups with "params", "lr" and "weight_decay": each parameter that trains in exactly one, none empty.
        """
        names = set(self.trainable())
        parameters = [p for n, p in self.model.named_parameters() if n in names]
        adapter = {id(p) for p in self.adapter_parameters()}
        groups = fusion_optimizer.by_kind(
            parameters, adapter, lr=lr, weight_decay=weight_decay, projector_lr=projector_lr
        )
        return self.arrange_groups(groups, lr)

    def arrange_groups(self, groups: Iterable[dict[str, Any]], base_lr: float) -> list[dict[str, Any]]:
        """Split an optimizer's groups as the fusion's `tower_lr`, `layer_decay` and `unfreeze_after` ask.

        Args:
            groups: groups of a torch optimizer.
            base_lr: the tower's learning rate where the fusion names none.
        """
        fusion = self.fusion
        head = self._head_parameters()
        groups = list(groups)
        if head and self.probe is not None and self.probe.lr is not None:
            groups = fusion_optimizer.apart(groups, {id(p) for p in head}, self.probe.lr)
        if fusion is None or self.taps is None:
            return groups
        below = fusion_optimizer.distances(self.anatomy.vision_parts(), self.taps.deepest)
        first = [*self.adapter_parameters(), *head]
        adapter = {id(p) for p in first} if fusion.unfreeze_after else set()
        return fusion_optimizer.regroup(
            groups, below, base_lr=base_lr, tower_lr=fusion.tower_lr, layer_decay=fusion.layer_decay, adapter=adapter
        )

    def warm_up(self, optimizer: Any, steps: int) -> WarmUp:
        """Carry out the fusion's `unfreeze_after` in a training loop of your own (LLaVA's trainer does it itself).

        Call `begin_step(i)` of what this returns before each optimizer step's first forward pass; `end()` lets every
        gradient through again.

        Args:
            optimizer: torch's AdamW or Adam on `param_groups`, before a saved state is loaded into it.
            steps: optimizer steps of the whole run.

        Raises:
            SettingError: no `unfreeze_after`, another optimizer, or groups that mix the projector with the rest.
        """
        if self.fusion is None or not self.fusion.unfreeze_after:
            raise SettingError("handle.warm_up() carries out a fusion's unfreeze_after, which is not set")
        # The auxiliary loss's head learns with the projector, which gets gradients through it.
        first = [*self.adapter_parameters(), *self._head_parameters()]
        held = WarmUp(optimizer, first, steps_of(self.fusion.unfreeze_after, steps))
        self._undo.push(held.end)
        return held

    def trained_share(self) -> float:
        """Share of the parameters that train, 0..1."""
        count, total = self._counts(set(self.trainable()))
        return count / max(1, total)

    def _counts(self, names: set[str]) -> tuple[int, int]:
        """Values of the parameters of these names, and of all."""
        sizes = {n: zero.numel(p) for n, p in self.model.named_parameters()}
        return sum(size for n, size in sizes.items() if n in names), sum(sizes.values())

    def report(self) -> str:
        """One line: how many parameters train, and their share of the model."""
        names = set(self.trainable())
        count, total = self._counts(names)
        line = f"{count:,} of {total:,} parameters train ({100 * count / max(total, 1):.2f} %), {len(names)} tensors"
        head = sum(zero.numel(p) for p in self._head_parameters())
        if head:
            line += f"; {head:,} of them are the head of the auxiliary loss, which is not part of the finished model"
        silent = self._silent_fusion(names)
        if silent:
            line += f"; {silent}"
        frozen = self.fusion is not None and self.fusion.train_tower == "frozen"
        if frozen and count and self.taps is not None and self.taps.detached:
            line += "; nothing in the vision tower trains, so detach changes nothing (see train_tower)"
        return line

    def silent_fusion(self) -> str | None:
        """Why the fusion does nothing and will not learn to, and what to do; None when it is not so.

        Its new weights are zero and frozen: Routing's default freeze keeps what patch() has just added where it is.
        Under DeepSpeed ZeRO-3 every rank must call this.
        """
        return self._silent_fusion(set(self.trainable()))

    def _silent_fusion(self, trainable: set[str]) -> str | None:
        if self.fusion is None or not fusion_attach.is_silent(self.anatomy, trainable):
            return None
        freezes = self.routing is not None and self.routing.freeze != "none"
        return f"{type(self.fusion).__name__} does nothing: its new weights are zero and frozen (" + (
            "train it first, without Routing (LLaVA's stage 1) and load that checkpoint, or set "
            'Routing.freeze = "none")'
            if freezes
            else "train it first: set requires_grad on handle.adapter_parameters())"
        )

    def save(self, directory: str | os.PathLike[str], form: str = "adapter") -> Path:
        """Save what was added or trained ("adapter") or the whole model ("full"); see `checkpoint.save`."""
        from llava_patch.patching import checkpoint

        return checkpoint.save(self, directory, form)


def restore_flags(model: nn.Module) -> Callable[[], None]:
    """Remember every requires_grad flag; the returned step brings them back."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    had_lora = lora.has_lora(model)

    def restore() -> None:
        if lora.has_lora(model) and not had_lora:
            return  # get_peft_model() came after the patch and has set the flags that hold now
        for parameter, flag in flags:
            parameter.requires_grad_(flag)

    return restore


def get_handle(model: nn.Module) -> Handle | None:
    """The handle of a patched model; None when it is not patched."""
    return handles.get_handle(model)


def fingerprint(model: nn.Module) -> str:
    """A short name of the patch on a model, "" when there is none; equal patches and weights give equal names."""
    handle = get_handle(model)
    if handle is None:
        return ""
    digest = hashlib.sha256(json.dumps(handle.record(), sort_keys=True).encode())
    for parameter in added_parameters(handle):
        with zero.gathered([parameter]):
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64]
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def added_parameters(handle: Handle) -> list[nn.Parameter]:
    """What a patch adds: the side branch, and with a fusion the projector that it widened."""
    added = list(side_branch.parameters(handle.anatomy))
    if handle.fusion is not None:
        added += handle.adapter_parameters()
    return added
