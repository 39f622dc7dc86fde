"""What a stock and a patched model do with one image and a question: no page, no drawing.

Three things are run for each model: its own `generate`, timed; and one forward pass that is watched layer by layer,
which says where each image token went and how much of the answer's attention it got.
"""

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.data.loaded import LoadedCheckpoint, base_of, load_base, load_subject
from llava_patch.hosts import configs
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import passes, trace
from llava_patch.measurements.attention_maps.measure import pixels_of, view
from llava_patch.patching.handle import get_handle
from llava_patch.patching.patch import patch
from llava_patch.settings import active
from llava_patch.settings.routing import AUTO

WHAT = "the demo"
CHUNK = 128  # attention queries held at a time


@dataclass(frozen=True, eq=False)
class Answer:
    """What one model did."""

    text: str
    methods: dict[str, Any]  # the patch that was on the model, settings by kind; {}: stock
    pixels: Any  # uint8 [height, width, 3], the image as the tower sees it; of tiles (anyres) the overview
    # bool [layers, rows, columns], on CPU: whether a decoder layer runs on the image token of a patch.
    runs: Tensor
    # float32 [layers, rows, columns], on CPU: how much the position that the answer begins at looks at each image
    # token, mean over heads; NaN where a layer does not have it.
    attention: Tensor
    image_tokens: int  # of the whole image, tiles and line ends included
    prompt_tokens: int  # those and the text
    prefill_ms: float  # from the call of `generate` to the first token, image encoding included
    decode_ms: float | None  # of each further token, mean; None: there is none
    tokens: int  # that were generated


@dataclass(eq=False)
class Models:
    """The models that are compared.

    Attributes:
        stock: the model that is compared with.
        patched: the patched checkpoint; None: the stock model answers again with `methods` on it.
        methods: the patch that gin asks for, settings by kind.
    """

    stock: LoadedCheckpoint
    patched: LoadedCheckpoint | None = None
    methods: dict[str, Any] = field(default_factory=dict)
    _warm: set[str] = field(default_factory=set)

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(find(self.stock.model).layers)

    def answers(
        self, image: Image.Image, question: str, tokens: int = 64, methods: Mapping[str, Any] | None = None
    ) -> tuple[Answer, Answer]:
        """The stock model's answer and the patched one's.

        Args:
            image: any size.
            question: without a placeholder for the image.
            tokens: how many an answer has at most.
            methods: what to put on the stock model, settings by kind, where the checkpoint carries no patch; None:
                `self.methods`.

        Raises:
            InputError: no question, or an image or prompt that the model cannot take.
            SettingError: methods that the model cannot take.
            HostError: image tokens that do not lie over the image patch by patch.
        """
        if not question.strip():
            raise InputError("ask a question about the image")
        image = image.convert("RGB")
        stock = self._answer("stock", self.stock, image, question, tokens)
        if self.patched is not None:
            return stock, self._answer("patched", self.patched, image, question, tokens)
        with patched(self.stock, self.methods if methods is None else methods) as subject:
            return stock, self._answer("patched", subject, image, question, tokens)

    def _answer(self, role: str, subject: LoadedCheckpoint, image: Image.Image, question: str, tokens: int) -> Answer:
        if role not in self._warm:  # the first call of a process is the slowest by far
            generate(subject, subject.inputs().forward_inputs(image, question), 2)
            self._warm.add(role)
        return answer(subject, image, question, tokens)


def open_models(checkpoint: str, base: str = "", device: str = "", dtype: str = "") -> Models:
    """Load what a demo of a checkpoint compares.

    A patched checkpoint stands beside its base, the one that its record names unless `base` is given; a stock one
    beside itself with the patch that gin asks for, or that is chosen later. In the second case one model is loaded.

    Raises:
        CheckpointError: as `load_subject`; or the base of a patched checkpoint is not known.
        SettingError: a split that is not a number.
    """
    files = configs.look(checkpoint)
    if files.record is not None:
        stock = base_of(checkpoint, base, "--base")
        patched = load_subject(checkpoint, stock if files.is_adapter else "", device, dtype)
        return Models(load_base(stock, device, dtype), patched)
    asked = active.configuration()
    methods = {} if asked is None else asked.lasting()
    if getattr(methods.get("routing"), "split", 0) == AUTO:
        raise SettingError(f'Routing.split = "{AUTO}": nothing is measured here; name a layer')
    with active.without_patches():
        return Models(load_subject(checkpoint, base, device, dtype), methods=methods)


@contextlib.contextmanager
def patched(subject: LoadedCheckpoint, methods: Mapping[str, Any]) -> Iterator[LoadedCheckpoint]:
    """Inside the block a model is patched; its processor, which may count image tokens, is a copy."""
    if not methods:
        raise SettingError("nothing to compare with: choose a routing variant or a share of tokens to prune")
    with patch(subject.model, **methods) as handle:
        processor = copy.copy(subject.processor)
        if processor is not None:
            handle.fit_processor(processor)
        yield dataclasses.replace(subject, processor=processor)


@torch.no_grad()
def answer(subject: LoadedCheckpoint, image: Image.Image, question: str, tokens: int = 64) -> Answer:
    """Have one model, stock or patched, answer, and look at how it does; arguments as `Models.answers` takes them."""
    anatomy, inputs = find(subject.model), subject.inputs().forward_inputs(image, question)
    handle = get_handle(subject.model)
    with passes.evaluating(subject.model):
        ids, stamps = generate(subject, inputs, tokens)
        layers = tuple(range(len(anatomy.layers)))
        with trace.traced(anatomy, inputs, CHUNK, layers, WHAT) as seen:
            passes.run(anatomy, inputs)
    runs, attention = _followed(seen, len(layers))
    cells = cells_of(anatomy, runs.shape[1])
    pixels = pixels_of(anatomy, inputs)[0]
    return Answer(
        text=subject.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        methods={} if handle is None else handle.applied(),
        pixels=view(anatomy, pixels[0], subject.image_processor).pixels,
        runs=runs[:, cells],
        attention=attention[:, cells],
        image_tokens=runs.shape[1],
        prompt_tokens=len(seen.mask),
        prefill_ms=1000 * (stamps[1] - stamps[0]),
        decode_ms=1000 * (stamps[-1] - stamps[1]) / (len(stamps) - 2) if len(stamps) > 2 else None,
        tokens=len(ids),
    )


def generate(subject: LoadedCheckpoint, inputs: dict[str, Any], tokens: int) -> tuple[Tensor, list[float]]:
    """Greedy decoding by the host's own `generate`.

    Returns:
        (int64 [generated tokens], seconds: when it was called, and when each token was there).
    """
    from transformers import StoppingCriteria, StoppingCriteriaList

    model, rest = subject.model, dict(inputs)
    ids = rest.pop("input_ids")
    stamps: list[float] = []

    class Clock(StoppingCriteria):  # called once a token, on every version
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            stamps.append(_now(ids.device))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    stamps.append(_now(ids.device))
    with torch.no_grad():
        out = model.generate(
            ids, **rest, do_sample=False, max_new_tokens=tokens, stopping_criteria=StoppingCriteriaList([Clock()])
        )
    return out[0, 1 - len(stamps) :].cpu(), stamps  # llava's may leave the prompt out


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _followed(seen: trace.Trace, n_layers: int) -> tuple[Tensor, Tensor]:
    """What became of each image token: (bool, float32), both [layers, image tokens] on CPU, as `Answer` has them."""
    mask = seen.mask.cpu()
    every, number = torch.arange(len(mask)), mask.long().cumsum(0) - 1
    runs = torch.zeros(n_layers, int(mask.sum()), dtype=torch.bool)
    attention = torch.full(runs.shape, float("nan"))
    for layer in range(n_layers):
        asking, giving = (places.get(layer, every).cpu() for places in (seen.asking, seen.giving))
        runs[layer, number[asking[mask[asking]]]] = True
        looked = seen.looked.get(layer)  # none where a prompt is nothing but an image
        if looked is not None and looked.shape[1]:
            attention[layer, number[giving[mask[giving]]]] = looked.mean(0).cpu()
    return runs, attention


def cells_of(anatomy: Anatomy, count: int) -> Tensor:
    """Which of an image's `count` tokens lies over which patch: int64 [rows, columns].

    Of an image in tiles (anyres) the overview's tokens are taken, which come first; of a fusion that adds tokens (STI)
    those of the main feature, which do too.

    Raises:
        HostError: there are fewer tokens than patches.
    """
    handle = get_handle(anatomy.model)
    taps = None if handle is None else handle.taps
    merge = 1 if taps is None else taps.merge_size
    rows, columns = (-(-side // merge) for side in anatomy.grid)
    first = 0 if anatomy.drops_cls else anatomy.vision_parts().prefix_tokens
    if count < first + rows * columns:
        raise HostError(
            f"{count} image tokens cannot be drawn over {rows} x {columns} patches: something pools or removes them "
            "behind the projector"
        )
    return first + torch.arange(rows * columns).view(rows, columns)
