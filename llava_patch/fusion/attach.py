"""How a fusion attaches to a host's tower and projector.

Its definition is in its own file, what trains in the tower in `training`, where a tap is detached in `features`.
"""

import functools
import json
import logging
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from llava_patch.core.compiled import aside
from llava_patch.core.errors import HostError, SettingError, refuse
from llava_patch.core.files import write_text
from llava_patch.core.method import Groups, Method
from llava_patch.core.stored import read_object
from llava_patch.core.undo import UndoStack
from llava_patch.fusion import deep_stack_decoder, training
from llava_patch.fusion.base import STI_POOL, Fusion, Join, Taps, choose_taps, differs
from llava_patch.fusion.features import check_grid, fuse, stacked
from llava_patch.fusion.linear import FusedLinear, narrowed
from llava_patch.hosts import compat, lora, storage, wrappers, zero
from llava_patch.hosts.anatomy import when_loaded

logger = logging.getLogger("llava_patch")


class FusionMethod(Method):
    """A fusion on a model; `taps` is the fusion resolved against the model's tower."""

    settings: Fusion
    taps: Taps

    # --- what it asks -------------------------------------------------------------------------------------------------

    def check_together(self, others: Mapping[str, Any]) -> None:
        """Refuse a routing that freezes the vision tower which this is to train."""
        routing = others.get("routing")
        if self.trains_tower and routing is not None and routing.freeze != "none":
            raise SettingError(
                f"{self.name}.train_tower = {self.settings.train_tower!r} contradicts Routing.freeze = "
                f'"{routing.freeze}", which freezes the vision tower: set train_tower = "frozen" or Routing.freeze = '
                '"none"'
            )

    @property
    def calls_decoder_layers(self) -> bool:  # type: ignore[override]
        """Whether the taps go into the decoder; other fusions leave it alone."""
        return self.settings.join is Join.LAYERS

    def check_model(self, loading: bool) -> None:
        """Refuse a projector without weights to grow."""
        if not loading and storage.is_out_of_reach(self.anatomy.projector):
            raise SettingError(
                f"the projector's weights are on the meta device, where {self.name} cannot grow them, and no hook of "
                "accelerate brings them in: load the model's weights first"
            )

    def agrees(self, asked: Any) -> bool:
        """What trains may differ from one run to the next."""
        return not differs(asked, self.settings)

    def check_added(self, there: Mapping[str, Method]) -> None:
        """Refuse to come under an auxiliary loss, or a pruning that must see the fused feature."""
        if "pruning" in there and hasattr(there["pruning"].settings, "reduce"):
            raise SettingError(
                f"a fusion under {there['pruning'].name}, which is there already, would change what it has to reduce: "
                "give both to one call of patch"
            )
        if "probe" in there:
            raise SettingError(
                "a fusion under an auxiliary loss that is there already would change what its head was made for: give "
                "both to one call of patch"
            )

    # --- what it changes ----------------------------------------------------------------------------------------------

    def resolve(self) -> None:
        """Resolve the taps against the host's tower and check that the host can take them; changes nothing."""
        anatomy = self.anatomy
        self.taps = taps = choose_taps(self.settings, anatomy.n_blocks, anatomy.main_block)
        anatomy.check_one_scale(self.name)
        if not taps.keeps_tokens:
            if anatomy.tiles:
                raise SettingError(
                    f"{self._token_setting()} changes the number of tokens of an image, but this model cuts images "
                    "into tiles (anyres) and counts their patches itself: use merge_size = 1 and another kind"
                )
            if anatomy.vision_model is not None:
                self._check_tokens()
        projector = anatomy.projector
        if convolution := next((m for m in projector.modules() if isinstance(m, nn.Conv2d)), None):
            raise HostError(
                f"{self.name} is not available on {type(projector).__name__}, which begins with a "
                f"{type(convolution).__name__} that pools patches: it needs a projector that begins with a Linear "
                "(mm_projector_type = linear or mlp2x_gelu)"
            )
        linear = anatomy.first_linear()[2]
        width = int(anatomy.vision_width)
        if isinstance(linear, FusedLinear) or linear.in_features != width:
            fused = taps.columns * taps.merge_size**2 * width
            raise SettingError(
                f"the projector takes {linear.in_features} channels, but this tower gives {width} ({fused} "
                "with this fusion): it was made for another tower or another fusion"
            )

    def _token_setting(self) -> str:
        """The setting that changes the number of tokens, for messages."""
        sti = self.taps.join is Join.TOKENS
        return f'{self.name}.kind = "sti"' if sti else f"{self.name}.merge_size = {self.taps.merge_size}"

    def _check_tokens(self) -> None:
        anatomy, taps, what = self.anatomy, self.taps, self._token_setting()
        tower = anatomy.vision_parts()
        own = taps.main_tokens(tower.grid)
        against = {
            f"{what} needs every patch, but the host drops the first token of a tower without a CLS token: set "
            'vision_feature_select_strategy = "full"': anatomy.drops_patch,
            f"{what} averages {STI_POOL} neighbouring tokens, but an image of this tower has {own}": (
                taps.join is Join.TOKENS and own < STI_POOL
            ),
            f"{what} joins patches, but the host keeps the tower's CLS token: set vision_feature_select_strategy = "
            '"default" (llava: mm_vision_select_feature = "patch")': (
                taps.merge_size > 1 and not anatomy.drops_cls and tower.prefix_tokens
            ),
        }
        refuse(against)
        check_grid(tower.grid, taps.merge_size, taps.merge_padding)

    def decoder_layers(self) -> tuple[int, ...]:
        """With DeepStack those that take a tap, in the order of the taps."""
        return self.taps.layers

    def attach(self, undo: UndoStack, *, zero_start: bool, loading: bool) -> None:
        """Feed other blocks to the projector, or to the decoder; new weights start as `FusedLinear.grow` says.

        When loading from a fused checkpoint no stock layer exists: undo then leaves the main columns.

        Modifications: hooks on the vision model, one of which puts the fused feature in the main feature's place, and
        one on the projector; the projector's first Linear replaced by a `FusedLinear` of the same name where it gets
        wider; with DeepStack those of `deep_stack_decoder`; on `llava` the tower's instance attributes `forward`
        (its `no_grad` lifted only while something in it trains) and, while it is not loaded yet, `load_model`.
        """
        anatomy, taps = self.anatomy, self.taps
        if storage.dequantise(anatomy.projector_owner, anatomy.norm.weight.dtype, undo, anatomy.projector_name):
            _say_dequantised(self.name)
        if taps.columns > 1 or taps.merge_size > 1:
            self._widen(undo, zero_start, loading)
        if taps.join is Join.LAYERS:
            if not self.settings.shares_projector:
                deep_stack_decoder.add_projector(anatomy, undo)
            elif not loading:
                _warn_shared(self.name)
            deep_stack_decoder.attach(anatomy, undo)
        if not taps.keeps_tokens and not loading:
            rows, columns = anatomy.grid
            _warn_other_tokens(self.name, taps.tokens((rows, columns)), rows * columns, anatomy.ids_hold_places)
        # `fused`: whether the taps were in what the tower gave last in this thread; without it features are the
        # caller's own. A bare one: what torch.compile makes of a subclass's attributes is another matter.
        last = threading.local()
        hooked: list[nn.Module] = []  # the vision model that has the taps; none while it is not loaded
        when_loaded(anatomy, undo, lambda late: hooked.append(self._hook_vision_model(late, last)))
        self._watch_projector(undo, last, hooked)
        wrappers.refuse_other_features(anatomy, undo)
        if self.trains_tower:
            training.let_tower_train(anatomy, undo)

    def _widen(self, undo: UndoStack, zero_start: bool, loading: bool) -> None:
        """Put a `FusedLinear` in the place of the projector's first Linear, and of what peft has put beside it."""
        anatomy, stock = self.anatomy, {}
        for parent, name, linear in anatomy.first_linears():
            with storage.brought_in(linear):
                fused = FusedLinear.grow(linear, self.taps.columns, self.taps.merge_size, zero_start)
            stock[fused] = fused.stock if loading else functools.partial(_where, fused, linear)
            setattr(parent, name, fused)

        def narrow() -> None:
            for parent, name, layer in anatomy.first_linears():  # among them what peft has made since
                with storage.brought_in(layer):
                    setattr(parent, name, stock[layer]() if layer in stock else narrowed(layer, fused))

        undo.push(narrow)

    def changed(self, settings: Any, undo: UndoStack) -> Method:
        """Another choice of what trains."""
        if settings.train_tower != "frozen" and not self.trains_tower:
            training.let_tower_train(self.anatomy, undo)
        return super().changed(settings, undo)

    def _hook_vision_model(self, undo: UndoStack, last: threading.local) -> nn.Module:
        """Put the fused feature in the main feature's place among the tower's hidden states."""
        anatomy, taps = self.anatomy, self.taps
        vision = anatomy.vision_model
        assert vision is not None
        tower = anatomy.vision_parts()  # an unknown tower is refused here, at patch time
        if not taps.keeps_tokens:
            self._check_tokens()
        prefix, grid = tower.prefix_tokens, tower.grid
        needed = {taps.main, *taps.blocks}

        @aside
        def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            last.fused = False
            compat.ask_all_states(kwargs)

        @aside
        def put_fused_feature(module: nn.Module, args: Any, output: Any) -> Any:
            if output is None:  # it has raised: what the projector gets next is not its
                last.fused = True
            states = getattr(output, "hidden_states", None)
            if states is None:  # nobody asked for hidden states: the host does not select a feature here
                return output
            if any(states[block] is None for block in needed):
                return output  # the caller asked for others
            if taps.join is Join.LAYERS:
                deep_stack_decoder.note(stacked(states, taps, anatomy.dropped_tokens, grid))
            output["hidden_states"] = (
                *states[: taps.main], fuse(states, taps, prefix, grid), *states[taps.main + 1 :],
            )  # fmt: skip
            last.fused = True
            return output

        undo.push(vision.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.push(vision.register_forward_hook(put_fused_feature, always_call=True).remove)
        return vision

    def _watch_projector(self, undo: UndoStack, last: threading.local, hooked: list[nn.Module]) -> None:
        """Refuse features of a tower whose taps took no part: where nothing gets wider, no shape would tell."""
        anatomy, name = self.anatomy, self.name

        @aside
        def check(module: nn.Module, args: Any) -> None:
            now = anatomy.vision_model_now
            if not (now is None or any(m is vision for m in now.modules() for vision in hooked)):
                raise HostError(
                    f"the vision tower was replaced after patch(): {name} has its taps in the old one. Put it back, or "
                    "call handle.remove() and patch again"
                )
            if getattr(last, "fused", True):  # features without any call of the tower are the caller's own
                return
            raise HostError(
                f"the projector was called on features that {name} had no part in: the vision tower ran without "
                "reporting its hidden states, which this version of the host may take from elsewhere. Call "
                "handle.remove(), or install a supported version"
            )

        hook = anatomy.projector.register_forward_pre_hook(check)
        undo.push(lambda: lora.unhook(anatomy.projector, hook))

    # --- what trains --------------------------------------------------------------------------------------------------

    def _own_projector(self) -> nn.Module | None:
        """DeepStack's projector for its taps."""
        return getattr(self.anatomy.projector_owner, self.anatomy.stack_name, None)

    def parameters(self) -> list[nn.Parameter]:
        """Between the vision tower and the decoder: the projector's, and DeepStack's second projector's."""
        own = self._own_projector()
        return [*self.anatomy.projector.parameters(), *([] if own is None else own.parameters())]

    @property
    def trains_tower(self) -> bool:  # type: ignore[override]
        """As `train_tower` says."""
        return self.settings.train_tower != "frozen"

    def freeze(self) -> None:
        """Set the flags of the vision tower."""
        training.set_tower_flags(self.anatomy, self.settings, self.taps)

    def arrange_groups(self, groups: Groups, base_lr: float, early: Collection[nn.Parameter]) -> Groups:
        """Give the tower groups of its own (`tower_lr`, `layer_decay`), and keep `unfreeze_after`'s apart."""
        below = training.distances(self.anatomy.vision_parts(), self.taps.deepest)
        adapter = {id(p) for p in early} if self.settings.unfreeze_after else set()
        return training.regroup(groups, below, self.settings, base_lr, adapter)

    def silent(self, trainable: Collection[str], others: Mapping[str, Any]) -> str | None:
        """Why the fusion does nothing and will not learn to, and what to do; None when it is not so.

        That is where its new weights are all zero, and stay so because they do not train.
        """
        own, (parent, name, layer) = self._own_projector(), self.anatomy.first_linear()
        if own is not None:
            decisive = _last_linear(own)
        elif isinstance(layer, FusedLinear) and layer.in_features > layer.main_features:
            decisive = [layer.weight, *(parent.parameters() if name == "base_layer" else ())]  # LoRA's own
        else:
            return None
        ids = {id(p) for p in decisive}
        if {n for n, p in self.anatomy.model.named_parameters() if id(p) in ids} & set(trainable):
            return None
        with zero.gathered(decisive), storage.brought_in(layer if own is None else own):
            new = _last_linear(own) if own is not None else [layer.weight[:, layer.main_features :]]
            if any(bool(values.any()) for values in new):
                return None
        routing = others.get("routing")
        return f"{self.name} does nothing: its new weights are zero and frozen (" + (
            "train it first, without Routing (LLaVA's stage 1) and load that checkpoint, or set "
            'Routing.freeze = "none")'
            if routing is not None and routing.freeze != "none"
            else "train it first: set requires_grad on handle.adapter_parameters())"
        )

    def remarks(self, trainable: set[str], others: Mapping[str, Any]) -> Iterator[str]:
        """A fusion that stays silent, and a `detach` without meaning."""
        silent = self.silent(trainable, others)
        if silent:
            yield silent
        if trainable and self.taps.detached and not self.trains_tower:
            yield "nothing in the vision tower trains, so detach changes nothing (see train_tower)"

    # --- HF's processor -----------------------------------------------------------------------------------------------

    def processor_fields(self) -> dict[str, int]:
        """Values of HF's `LlavaProcessor` under which it counts tokens as the fused model does; {} on `llava`.

        It counts (height // patch_size) * (width // patch_size) + num_additional_image_tokens, less one where the CLS
        token is dropped.
        """
        anatomy, taps = self.anatomy, self.taps
        if not anatomy.ids_hold_places:
            return {}
        cell = anatomy.patch_size * taps.merge_size
        rows, columns = (n * anatomy.patch_size // cell for n in anatomy.grid)
        further = taps.tokens(anatomy.grid) - rows * columns + int(anatomy.drops_cls)
        if not anatomy.drops_cls and taps.merge_size == 1:
            further += anatomy.vision_parts().prefix_tokens
        return {"patch_size": cell, "num_additional_image_tokens": further}

    def fit_files(self, folder: Path) -> None:
        """Make the processor in a saved folder count as the fused model does."""
        path = folder / "processor_config.json"
        if self.taps.keeps_tokens or not path.is_file():
            return
        values = read_object(path)
        fitted = {**values, **self.processor_fields()}
        if fitted != values:
            write_text(path, json.dumps(fitted, indent=2) + "\n")


def _last_linear(projector: nn.Module) -> list[Any]:
    """The parameters of a projector's last Linear."""
    return list([m for m in projector.modules() if isinstance(m, nn.Linear)][-1].parameters())


@functools.lru_cache
def _say_dequantised(name: str) -> None:
    logger.warning(
        "%s: the projector was quantised, and is dequantised to take the taps. In 8 bit, where stock layers round "
        "their inputs too, the output differs by that rounding from the stock model's", name,
    )  # fmt: skip


def _where(now: nn.Linear, stock: nn.Linear) -> nn.Linear:
    """A stock layer, on the device and in the precision to which the model was brought since it left."""
    here = now.weight
    if not here.is_meta and not zero.is_partitioned(stock.parameters()):
        for tensor in stock.parameters():
            if not tensor.is_meta and tensor.dtype.is_floating_point:
                tensor.data = tensor.data.to(here.device, here.dtype)
    return stock


@functools.lru_cache
def _warn_shared(name: str) -> None:
    logger.warning(
        '%s.projector = "shared": the taps go through the model\'s own projector, so before it is trained the model\'s '
        "output is not the stock model's", name,
    )  # fmt: skip


@functools.lru_cache
def _warn_other_tokens(name: str, tokens: int, stock: int, ids_hold_places: bool) -> None:
    hint = "; HF's processor must write as many: handle.fit_processor(processor)" if ids_hold_places else ""
    logger.warning(
        "%s: an image has %d tokens instead of %d, so before it is trained the model's output is not the stock model's"
        "%s", name, tokens, stock, hint,
    )  # fmt: skip
