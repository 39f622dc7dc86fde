"""How the auxiliary loss attaches to a model: visual tokens are noted on their way, and the loss grows by one term."""

import contextlib
import logging
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.compiled import aside, follow
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.method import Groups, Method
from llava_patch.core.undo import UndoStack, meanwhile
from llava_patch.fusion import training
from llava_patch.hosts import call_context, compat, tiles, wrappers, zero
from llava_patch.hosts.anatomy import get_handle
from llava_patch.probe.auxiliary.head import Head, Seen, check_images, token_errors, zero_gradient_pass
from llava_patch.probe.auxiliary.regions import KEY, Marker
from llava_patch.probe.sequence import Layout
from llava_patch.probe.view import layout_of, make_transform
from llava_patch.settings.auxiliary import AuxiliaryProbe

logger = logging.getLogger("llava_patch")

HEAD = "llava_patch_rprobe"  # its name on the causal LM
SILENT_BATCHES = 50  # training batches without any region after which a warning says so
UNSEEN = (
    "AuxiliaryProbe: none of the first %d training batches of this process had a region, so that its loss was not "
    "computed: records carry them under %r; a collator or TrainingArguments.remove_unused_columns (set it to False) "
    'may drop that, and AuxiliaryProbe.broken = "skip" leaves out what does not fit'
)
SHOWN = ("crop", "pad", "resize")  # modes in which one whole image becomes one square
_IGNORED = "_keys_to_ignore_on_save"  # transformers' own list


class Auxiliary(Method):
    """The loss on one model: its head (None once released), on which steps it is computed, and what the logs show."""

    settings: AuxiliaryProbe
    calls_decoder_layers = True  # copies of them
    layout: Layout | None = None
    head: Head | None = None
    _without: int | None = 0  # batches, as long as none had a region
    _step: int | None = None
    _seen: Seen | None = None
    _watching = False
    _sums: Tensor | None = None

    def check_together(self, others: Mapping[str, Any]) -> None:
        """Refuse a routing that freezes what the loss is to train."""
        routing = others.get("routing")
        if self.settings.weight and routing is not None and routing.freeze != "none":
            raise SettingError(
                f'Routing.freeze = "{routing.freeze}" freezes the projector and the vision tower, so that '
                'AuxiliaryProbe would train nothing but its own head: set Routing.freeze = "none", or leave '
                "AuxiliaryProbe out"
            )

    def parameters(self) -> list[nn.Parameter]:
        """The head's."""
        return [] if self.head is None else list(self.head.parameters())

    def arrange_groups(self, groups: Groups, base_lr: float, early: Collection[nn.Parameter]) -> Groups:
        """Give the head its own learning rate."""
        head, lr = {id(p) for p in self.parameters()}, self.settings.lr
        return training.apart(groups, head, lr) if head and lr is not None else groups

    def remarks(self, trainable: set[str], others: Mapping[str, Any]) -> Iterator[str]:
        """The size of the head."""
        if head := sum(zero.numel(p) for p in self.parameters()):
            yield f"{head:,} of them are the head of the auxiliary loss, which is not part of the finished model"

    def begin_step(self, step: int) -> None:
        """Say how many steps are done, in earlier parts of a resumed run too; before each step if `share` < 1."""
        self._step = step

    def marker(self, image_processor: Any, tokenizer: Any, mode: str) -> Marker:
        """What marks the regions of this model's data, with a weight above 0; see `RegionCollator`."""
        assert self.layout is not None
        if mode not in SHOWN:
            raise SettingError(f"RegionCollator: mode = {mode!r}: expected one of {', '.join(SHOWN)}")
        transform = make_transform(self.anatomy, image_processor, mode)
        vocabulary = int(zero.shape(self.anatomy.embed_tokens.weight)[0])
        return Marker(transform, self.layout, tokenizer, self.settings, vocabulary)

    @property
    def computes(self) -> bool:
        """Whether this step's loss has the term; an InputError where `share` < 1 and nobody said which step it is."""
        if self.settings.share == 1:
            return True
        if self._step is None:
            raise InputError(
                f"AuxiliaryProbe.share = {self.settings.share}: call handle.auxiliary.begin_step(i) before each step, "
                "or llava_patch.integrations.training.auxiliary.follow(trainer) once"
            )
        return random.Random(f"{self.settings.seed}:{self._step}").random() < self.settings.share

    def attach(self, undo: UndoStack, *, zero_start: bool, loading: bool) -> None:
        """Put the loss on the model; the head follows what the fusion does, so this comes last.

        Modifications: a module `llava_patch_rprobe` on the causal LM; its instance attributes `forward` and
        `_keys_to_ignore_on_save`; `encode_images` of the causal LM on `llava`, `get_image_features` of the inner
        LlavaModel on HF.

        The patched `forward` takes one argument more, `rprobe`, the regions of a batch. It adds the term in training
        mode with gradients on alone: else regions are dropped unread and the loss is the model's own, so that an
        evaluation during training (`eval_loss`) measures the next-token loss.
        """
        model = self.anatomy.model
        if not self.settings.weight:
            logger.warning("AuxiliaryProbe.weight = 0: no head is built, and training is as without it")
        else:
            self.anatomy.check_one_scale("AuxiliaryProbe")
            if tiles.cuts_tiles(self.anatomy):
                raise SettingError(
                    "AuxiliaryProbe does not train on images in tiles (anyres), whose tokens differ from image to "
                    "image: leave it out (LLaVA-1.5 takes whole images: image_aspect_ratio = pad)"
                )
            try:
                self.layout = layout_of(self.anatomy, get_handle(model).tokens_per_image)
            except InputError as error:
                raise SettingError(f"AuxiliaryProbe: {error}") from None
            self.head = Head(self.anatomy, self.layout, self.settings)
            undo.add_module(model, HEAD, self.head)
            undo.push(lambda: model.add_module(HEAD, self.head) if not hasattr(model, HEAD) else None)
            names = [f"{HEAD}.{name}" for name in self.head.state_dict()]
            undo.set_attribute(model, _IGNORED, [*(getattr(model, _IGNORED, None) or ()), *names])
            undo.wrap(*self.anatomy.encoder, self._encode_and_note)
        named = wrappers.arguments_of(model.forward)

        @aside
        def forward_and_rebuild(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            regions = kwargs.pop(KEY, None)
            if self.head is None or not model.training or not torch.is_grad_enabled():
                return follow(forward, *args, **kwargs)
            self._seen = None
            with meanwhile(self, _watching=True):
                outputs = follow(forward, *args, **kwargs)
            return self._add(outputs, regions, named(args, kwargs))

        undo.wrap(model, "forward", forward_and_rebuild)

    def _encode_and_note(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        features = encode(*args, **kwargs)
        call = call_context.current(self.anatomy)
        if self._watching and (call is None or call.instead is None):
            assert self.head is not None
            injections, layers = None, self.head.decoder.injection_layers
            if layers:  # what DeepStack adds to these images in the head's layers
                assert call is not None and call.offered is not None  # its wrapper of the encoder lies under ours
                injections = torch.stack(call.offered[: len(layers)])
            pixels = args[0] if args else kwargs["pixel_values"]
            self._seen = Seen(compat.one_tensor(features), pixels, injections)
        return features

    def _add(self, outputs: Any, regions: Mapping[str, Tensor] | None, given: Mapping[str, Any]) -> Any:
        """The outputs of a forward pass with the loss's term in their loss."""
        seen, self._seen = self._seen, None
        assert self.head is not None
        named = hasattr(outputs, "loss")
        loss = outputs.loss if named else outputs[0]
        if given.get("labels") is None or loss is None:
            if regions is None:
                return outputs
            raise InputError(
                "a training batch with regions but without labels: the auxiliary loss is added to the model's own loss"
            )
        # How much of its step a batch is: newer Trainers pass the number of labels in all batches and ranks of a step
        # to models that take it; the loss is then a sum over it, and the auxiliary term has to be shared out alike.
        weight: Any = 1.0
        if (of_step := given.get("num_items_in_batch")) is not None:
            weight = (given["labels"] != wrappers.IGNORE_INDEX).sum() / of_step
        if (
            self._without is not None
        ):  # say it, once, when none of the first batches had a region; later ones may lack it
            self._without = None if regions is not None else self._without + 1
            if self._without == SILENT_BATCHES:
                self._without = None
                logger.warning(UNSEEN, SILENT_BATCHES, KEY)
        if regions is None or not self.computes:
            term = zero_gradient_pass(self.head, self.anatomy.embed_tokens)
            self._note(loss, weight, None)
        else:
            if seen is None:
                raise InputError("a batch with regions but without images")
            check_images(regions, len(seen.tokens))
            errors = token_errors(self.head, self.anatomy.embed_tokens, seen, regions).to(loss.device)
            term = self.settings.weight * weight * errors.mean()
            self._note(loss, weight, errors)
        total = loss + term.to(loss)
        if not named:
            return (total, *outputs[1:])
        outputs.loss = total
        return outputs

    def _note(self, loss: Tensor, weight: Any, errors: Tensor | None) -> None:
        """Add a batch to what the next log line is made of; stays on the device."""
        with torch.no_grad():
            if self._sums is None or self._sums.device != loss.device:
                self._sums = torch.zeros(4, device=loss.device)
            self._sums[0] += loss.detach()
            self._sums[1] += weight
            if errors is not None:
                self._sums[2] += errors.detach().sum()
                self._sums[3] += len(errors)

    def take_logs(self) -> dict[str, float]:
        """Mean losses since the last call, over all ranks; every rank must call this.

        "ntp_loss" is the model's own, "rprobe_loss" the MSE over the target tokens of the samples that carried a region
        (unweighted); a key whose mean would be over nothing is left out.
        """
        device = next(self.anatomy.projector.parameters()).device
        sums = torch.zeros(4, device=device) if self._sums is None else self._sums
        self._sums = None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        loss, weight, error, count = sums.tolist()
        means = (("ntp_loss", loss, weight), ("rprobe_loss", error, count))
        return {name: total / over for name, total, over in means if over}

    @contextlib.contextmanager
    def unobserved(self) -> Iterator[None]:
        """Forward passes inside do not count in what is logged: a measurement's, not the run's."""
        sums = None if self._sums is None else self._sums.clone()
        with meanwhile(self, _sums=sums, _without=None):  # which says nothing
            yield

    def release(self) -> None:
        """Take the head off the model, whose training is over, so that nothing saves or counts it."""
        if self.head is not None:
            delattr(self.anatomy.model, HEAD)
            self.head = None
