"""What `patch` returns: what is applied to a model, what trains, and how it comes off again."""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from llava_patch.core import compiled
from llava_patch.core.errors import LlavaPatchError, SettingError
from llava_patch.core.method import Groups, Method
from llava_patch.core.records import FORMAT
from llava_patch.core.registry import KINDS, TRAINING_ONLY
from llava_patch.core.undo import UndoStack, meanwhile
from llava_patch.fusion.training import WarmUp, by_kind, steps_of
from llava_patch.hosts import call_context, lora, zero
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.hosts.anatomy import get_handle as get_handle
from llava_patch.routing.schedule import LayerSchedule, make_schedule
from llava_patch.settings.methods import to_dict

if TYPE_CHECKING:
    from llava_patch.fusion.base import Fusion, Taps
    from llava_patch.probe.auxiliary.attach import Auxiliary
    from llava_patch.routing.pruning import Pruning
    from llava_patch.settings.methods import AuxiliaryProbe, Routing


def _of(kind: str, attribute: str = "settings") -> Any:
    """A property: an attribute of the method that is applied of one kind, or None."""
    return property(lambda handle: getattr(handle.methods.get(kind), attribute, None))


class Handle:
    """A patched model's handle: what was applied, what trains, how to save it and how to take it off.

    Attributes:
        model: the patched causal LM.
        anatomy: where its parts are.
        methods: what is applied, by kind; `fusion`, `routing`, `pruning` and `probe` are their settings, or None.
        taps: the blocks that the fusion taps on this tower, or None.
        trained_tower: whether the vision tower's weights are not the original ones: something in it trains, or did in
            an earlier run.
        active: whether the patch is still on the model.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        """Use `patch`, not this."""
        self.model = model
        self.anatomy = anatomy
        self.methods: dict[str, Method] = {}
        self.trained_tower = False
        self._undo = UndoStack()
        self._undo.push(restore_flags(model))
        self.active = True
        self._carries = False
        self._began = self._mark()
        self._entered: list[tuple[Any, ...]] = []

    # --- what is applied ----------------------------------------------------------------------------------------------

    fusion: "Fusion | None" = _of("fusion")
    routing: "Routing | None" = _of("routing")
    pruning: "Pruning | None" = _of("pruning")
    probe: "AuxiliaryProbe | None" = _of("probe")
    taps: "Taps | None" = _of("fusion", "taps")

    @property
    def auxiliary(self) -> "Auxiliary | None":
        """R-Probe as an auxiliary loss, or None."""
        return self.methods.get("probe")  # type: ignore[return-value]

    def applied(self) -> dict[str, Any]:
        """The applied settings by kind."""
        return {kind: method.settings for kind, method in self.methods.items()}

    def _lasting_and_training(self) -> tuple[list[Method], list[Method]]:
        """Methods that last, and those that are there for training alone."""
        lasting = [method for kind, method in self.methods.items() if kind not in TRAINING_ONLY]
        return lasting, [method for kind, method in self.methods.items() if kind in TRAINING_ONLY]

    def settings(self) -> dict[str, Any]:
        """The applied settings as JSON values, as a run's llava_patch.json records them."""
        applied = self.applied()
        return self.record() | {kind: to_dict(applied[kind]) for kind in TRAINING_ONLY if kind in applied}

    def record(self) -> dict[str, Any]:
        """What a checkpoint's config holds: all that its finished model needs, so not the auxiliary loss."""
        applied, lasting = self.applied(), [kind for kind in KINDS if kind not in TRAINING_ONLY]
        record = {"format": FORMAT, **{kind: to_dict(applied[kind]) if kind in applied else None for kind in lasting}}
        return record | {"trained_tower": True} if self.trained_tower else record

    def program(self) -> LayerSchedule:
        """What each decoder layer does under the applied settings."""
        injections = tuple(layer for method in self.methods.values() for layer in method.decoder_layers())
        return make_schedule(self.routing, self.pruning, len(self.anatomy.layers), injections)

    def __repr__(self) -> str:
        parts = [str(settings) for settings in self.applied().values()]
        removed = "" if self.active else " (removed)"
        return f"<llava_patch on {type(self.model).__name__}: {', '.join(parts) or 'nothing'}{removed}>"

    # --- how it comes off ---------------------------------------------------------------------------------------------

    def _mark(self) -> tuple[Any, ...]:
        """Where a call of `patch` begins."""
        return len(self._undo), dict(self.methods), self.trained_tower, self._carries

    def _back_to(self, mark: tuple[Any, ...]) -> None:
        """Take back what was applied since; everything when the mark is the beginning."""
        steps, methods, trained_tower, carries = mark
        with one_at_a_time(self.model):
            if steps <= 1:  # the flags alone
                self.remove()
            elif self.active:
                self._undo.unwind(to=steps)
                compiled.forget()
                self.methods, self.trained_tower, self._carries = dict(methods), trained_tower, carries

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused, as for its model."""
        refuse_copy(protocol)

    def __enter__(self) -> "Handle":
        """Use the patch inside a `with` block; what the block's own `patch` added is taken off at its end."""
        self._entered.append(self._began)
        return self

    def __exit__(self, *error: object) -> None:
        """Take the patch off, also after an exception."""
        self._back_to(self._entered.pop())

    def remove(self) -> None:
        """Restore the stock model: modules, instance attributes, hooks, config and requires_grad flags.

        What was trained is lost unless it was saved. Can be called twice. After loading a fused checkpoint there is no
        stock projector to go back to: its first layer keeps the main columns.
        """
        with one_at_a_time(self.model):
            if self.active:
                self.active = False
                self._undo.unwind()
                compiled.forget()

    # --- images -------------------------------------------------------------------------------------------------------

    @property
    def tokens_per_image(self) -> int:
        """Tokens that an image (or tile) becomes in the decoder, line ends of anyres apart."""
        anatomy, grid = self.anatomy, self.anatomy.grid
        if self.taps is not None and not self.taps.keeps_tokens:
            return self.taps.tokens(grid)
        drops = anatomy.drops_cls or anatomy.vision_model is None
        return grid[0] * grid[1] + (0 if drops else anatomy.vision_parts().prefix_tokens)

    def fit_processor(self, processor: Any) -> None:
        """Make HF's `LlavaProcessor` write as many image placeholders as the fused model has tokens, in place.

        Needed with merge_size = 2 and DenseConnector(kind="sti"); a checkpoint that `save` writes holds it already.
        """
        for name, value in getattr(self.methods.get("fusion"), "processor_fields", dict)().items():
            setattr(processor, name, value)

    def image_positions(
        self, image_mask: Tensor | None = None, kept: Tensor | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Tell the model where the images are in the next call, for embeddings that were merged by hand.

        For chunked prefill as well, where a chunk's embeddings come without pixels.

        Args:
            image_mask: bool [batch, tokens] of the next call's tokens, or of all tokens so far; None: as the host says.
            kept: what pruning keeps, to repeat an earlier choice, as `cache.kept()` gives it: bool of the same shape,
                or int64, how many stages each position passes, where it has several. None: choose.

        Returns:
            A context manager for one call of the model.
        """
        if not self.program().does_something:
            return contextlib.nullcontext()  # the stock model does not ask
        return call_context.placed(self.anatomy, image_mask, kept)

    # --- what trains --------------------------------------------------------------------------------------------------

    def apply_freeze(self) -> None:
        """Set requires_grad as the settings say; call it after a training script has set its own flags.

        Raises:
            SettingError: a freeze strategy that would freeze peft's LoRA layers, which are there to be trained.
        """
        for method in self.methods.values():
            method.freeze()

    def trainable(self) -> list[str]:
        """Names of the parameters that a training step gives a gradient, in the model's order."""
        unused: set[int] = set()
        if self.anatomy.tower_apart and not any(method.trains_tower for method in self.methods.values()):
            unused = {id(p) for p in self.anatomy.tower.parameters()}  # llava runs its tower under no_grad
        elif self.anatomy.vision_model is not None:
            deepest = self.anatomy.main_block if self.taps is None else self.taps.deepest
            unused = {id(p) for p in self.anatomy.vision_parts().unused(deepest)}
        return [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in unused]

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Parameters between the vision tower and the decoder: the projector's, and DeepStack's second projector's."""
        fusion = self.methods.get("fusion")
        return list(self.anatomy.projector.parameters()) if fusion is None else fusion.parameters()

    def added_parameters(self) -> list[nn.Parameter]:
        """What a checkpoint must hold: the side branch, and with a fusion the projector that it widened."""
        return [parameter for method in self._lasting_and_training()[0] for parameter in method.parameters()]

    def training_parameters(self) -> list[nn.Parameter]:
        """What is there for training alone: the head of the auxiliary loss."""
        return [parameter for method in self._lasting_and_training()[1] for parameter in method.parameters()]

    def param_groups(self, lr: float, weight_decay: float = 0.0, projector_lr: float | None = None) -> Groups:
        """Optimizer groups of everything that trains, for a training loop of your own.

        `optimizer = torch.optim.AdamW(handle.param_groups(1e-5, weight_decay=0.05))`. The fusion's `tower_lr` and
        `layer_decay` are in the groups; LLaVA's and Hugging Face's trainers get them without this. A scheduler that
        multiplies each group's learning rate keeps their ratios. With `unfreeze_after`, see `warm_up`.

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
        return self.arrange_groups(by_kind(parameters, adapter, lr, weight_decay, projector_lr), lr)

    def arrange_groups(self, groups: Iterable[dict[str, Any]], base_lr: float) -> Groups:
        """Split a torch optimizer's groups as the settings ask: tower_lr, layer_decay, unfreeze_after, the head's lr.

        `base_lr` is the tower's learning rate where the fusion names none.
        """
        lasting, training = self._lasting_and_training()
        groups = list(groups)
        for method in (*training, *lasting):
            groups = method.arrange_groups(groups, base_lr, self._early())
        return groups

    def _early(self) -> list[nn.Parameter]:
        """What learns during a warm-up: the adapter, and the auxiliary loss's head, through which it gets gradients."""
        return [*self.adapter_parameters(), *self.training_parameters()]

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
        held = WarmUp(optimizer, self._early(), steps_of(self.fusion.unfreeze_after, steps))
        self._undo.push(held.end)
        return held

    def trained_share(self) -> float:
        """Share of the parameters that train, 0..1."""
        count, total = self._counts(set(self.trainable()))
        return count / max(total, 1)

    def _counts(self, names: set[str]) -> tuple[int, int]:
        """Values of the parameters of these names, and of all."""
        sizes = {n: zero.numel(p) for n, p in self.model.named_parameters()}
        return sum(size for n, size in sizes.items() if n in names), sum(sizes.values())

    def report(self) -> str:
        """One line: how many parameters train, and their share of the model."""
        names = set(self.trainable())
        count, total = self._counts(names)
        line = f"{count:,} of {total:,} parameters train ({100 * count / max(total, 1):.2f} %), {len(names)} tensors"
        lasting, training = self._lasting_and_training()
        remarks = (method.remarks(names, self.applied()) for method in (*training, *lasting))
        return "; ".join([line, *itertools.chain(*remarks)])

    def silent_fusion(self) -> str | None:
        """Why the fusion does nothing and will not learn to, and what to do; None when it is not so.

        Its new weights are zero and frozen: Routing's default freeze keeps what patch() has just added where it is.
        Under DeepSpeed ZeRO-3 every rank must call this.
        """
        fusion: Any = self.methods.get("fusion")
        return None if fusion is None else fusion.silent(set(self.trainable()), self.applied())

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def fit_files(self, folder: Path) -> None:
        """Make the host's files in a folder where the model was saved fit the patch."""
        for method in self.methods.values():
            method.fit_files(folder)

    def save(
        self,
        directory: str | os.PathLike[str],
        form: str = "adapter",
        base: str = "",
        measured: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save what was added or trained, or the whole model.

        Args:
            directory: folder to write. A new one appears at once; in an earlier save's, files are replaced when all are
                on the disk. With weights that DeepSpeed ZeRO-3 or FSDP2 has partitioned, every rank must call this.
            form: "adapter": only what was added or trained, with a pointer to the base; "full": everything.
            base: what an adapter is to name as its base, a hub name where others are to load it; "": where the model
                came from.
            measured: what was measured on the model, by name, for the model card.

        Returns:
            The folder.

        Raises:
            CheckpointError: the patch was removed, an unknown form, an adapter without a base to point at, or whose
                model is not that base any more (LoRA merged into it), or a folder that holds another checkpoint.
            StorageError: the disk or folder does not take it.
        """
        from llava_patch.patching import checkpoint

        return checkpoint.save(self, directory, form, base, measured)

    def save_pretrained(
        self, directory: str | os.PathLike[str], push_to_hub: bool = False, repo_id: str = "", **options: Any
    ) -> Path:
        """The same by the habits of Hugging Face's `save_pretrained`.

        Args:
            directory: folder to write.
            push_to_hub: upload as well, as `push_to_hub` of this handle does.
            repo_id: the repository on the hub; "": the folder's name, in the account that is logged in.
            options: those of `save`, and with `push_to_hub` those of `push_to_hub`.
        """
        asked = {name: options.pop(name) for name in ("form", "base", "measured") if name in options}
        if push_to_hub:
            self.push_to_hub(repo_id or Path(directory).resolve().name, **asked, **options)
        elif options or repo_id:
            raise LlavaPatchError(f"save_pretrained: {[*options, 'repo_id'][0]} is for push_to_hub=True")
        return self.save(directory, **asked)

    def push_to_hub(
        self,
        repo_id: str,
        form: str = "adapter",
        base: str = "",
        measured: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """Upload what `save` writes to the Hugging Face hub, with its model card.

        The host's own `from_pretrained("me/adapter")`, or `llava_patch.load(base, "me/adapter")`, then opens it.

        Args:
            repo_id: the repository, "me/adapter"; it is made where there is none.
            form: "adapter" or "full", as of `save`.
            base: the base's name on the hub; needed where the model came from a folder of this machine.
            measured: what was measured on the model, by name, for the model card.
            options: of the hub's client: `private`, `token`, `revision`, `commit_message`, `create_pr`.

        Returns:
            The address of the commit.

        Raises:
            CheckpointError: as of `save`; a base, or a vision tower of llava, that is a folder of this machine, which
                nobody else could load.
        """
        from llava_patch.patching import publishing

        return publishing.push(self, repo_id, form, base, measured, **options)


def refuse_copy(protocol: Any) -> NoReturn:
    """What copy.deepcopy, pickle and torch.save call: the copy's methods would still run the original's weights."""
    raise LlavaPatchError(
        "a patched model cannot be copied or pickled (copy.deepcopy, pickle, torch.save(model), a process that is "
        "spawned with it): call handle.remove() first and patch the copy, or handle.save(folder) and load it again; "
        "torch.save(model.state_dict()) holds the weights"
    )


@contextlib.contextmanager
def copyable(model: nn.Module) -> Iterator[None]:
    """Inside the block a patched model, which refuses it, is copied as any other: for who only looks at the copy."""
    with contextlib.ExitStack() as until_then:
        for part in model.modules():
            if "__reduce_ex__" in vars(part):
                stock = type(part).__reduce_ex__.__get__(part)
                until_then.enter_context(meanwhile(part, __reduce_ex__=stock))
        yield


def one_at_a_time(model: nn.Module) -> "threading.RLock":
    """The lock under which a model is changed: patch() and remove() from two threads come one after the other."""
    return _LOCKS.setdefault(model, threading.RLock())


_LOCKS: "WeakKeyDictionary[nn.Module, threading.RLock]" = WeakKeyDictionary()


def restore_flags(model: nn.Module) -> Callable[[], None]:
    """Remember every requires_grad flag; the returned step brings them back.

    By module and name: where weights are offloaded, each call makes other parameters of them.
    """
    flags = [(m, n, p, p.requires_grad) for m in model.modules() for n, p in m.named_parameters(recurse=False)]
    had_lora = lora.has_lora(model)

    def restore() -> None:
        if lora.has_lora(model) and not had_lora:
            return  # get_peft_model() came after the patch and has set the flags that hold now
        for module, name, parameter, flag in flags:
            parameter.requires_grad_(flag)
            if (now := module._parameters.get(name)) is not None and now is not parameter:
                now.requires_grad_(flag)

    return restore
