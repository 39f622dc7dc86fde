"""What the probe trains on, computed once: frozen visual tokens, frozen text embeddings, pixels under target tokens.

Everything lies in CPU memory (a store on disk is to come); only a batch at a time goes to the probe's device. The
vision tower runs here and never again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.errors import HostError, InputError, SettingError
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.probe.progress import progress_bar
from llava_patch.probe.sample import Sample
from llava_patch.probe.sequence import ProbeSequence, TokenGrid, build_sequence, merge_size, patchify, target_mask
from llava_patch.probe.settings import RProbe
from llava_patch.probe.transform import Transform, black_out
from llava_patch.probe.view import make_transform

__all__ = ["Batch", "FrozenData", "evaluation", "freeze_samples", "make_transform"]

ENCODE_BATCH = 32  # samples that go through the vision tower at once


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and targets of one step, on the probe's device.

    Attributes:
        image_tokens: float32 [batch, image tokens, hidden].
        text_tokens: float32 [batch, text width, hidden], padded at the end.
        sequence: their order and positions.
        pixels: float32 [targets, pixels], in the order in which the decoder answers.
        counts: int64 [batch], targets of each sample.
        injections: float32 [batch, layers, image tokens, hidden], what DeepStack adds to the image tokens in the
            probe's layers; None without it.
    """

    image_tokens: Tensor
    text_tokens: Tensor
    sequence: ProbeSequence
    pixels: Tensor
    counts: Tensor
    injections: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FrozenData:
    """The frozen inputs of many samples, on CPU.

    Attributes:
        samples: where they came from; pages are drawn anew when they are asked for.
        labels: (id, document, text) of each sample.
        grid: tokens of one image.
        image_tokens: float32 [images, image tokens, hidden].
        image_index: int64 [samples], the image of each sample (lines of one page share it).
        target: bool [samples, image tokens].
        text_ids: int64 [samples, width], rows of `text_table`, padded with 0.
        text_counts: int64 [samples].
        text_table: float32 [distinct tokens, hidden].
        pixels: float32 [targets of all samples, pixels].
    """

    samples: Sequence[Sample]
    labels: list[tuple[str, str, str]]
    grid: TokenGrid
    image_tokens: Tensor
    image_index: Tensor
    target: Tensor
    text_ids: Tensor
    text_counts: Tensor
    text_table: Tensor
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.image_index)

    @property
    def counts(self) -> Tensor:
        """Targets of each sample, int64 [samples]."""
        return self.target.sum(1)

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> Batch:
        """The samples of `index` (int64 [batch], on CPU)."""
        counts = self.counts
        ends = counts.cumsum(0)
        chosen = counts[index]
        # Rows start..start+count-1 of every chosen sample, one after the other.
        starts = (ends - counts)[index] - (chosen.cumsum(0) - chosen)
        rows = torch.arange(int(chosen.sum())) + starts.repeat_interleave(chosen)
        text_counts = self.text_counts[index]
        width = int(text_counts.max())
        target = self.target[index]
        places = self.grid.positions().to(torch.float32).expand(len(index), -1, -1)
        start = torch.full_like(text_counts, self.grid.text_start)
        sequence = build_sequence(target, torch.ones_like(target), places, text_counts, start, width)
        return Batch(
            image_tokens=self.image_tokens[self.image_index[index]].to(device),
            text_tokens=self.text_table[self.text_ids[index, :width]].to(device),
            sequence=sequence.to(device),
            pixels=self.pixels[rows].to(device),
            counts=chosen.to(device),
        )


def freeze_samples(
    anatomy: Anatomy,
    transform: Transform,
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: RProbe,
    progress: bool = False,
    label: str = "samples",
) -> FrozenData:
    """Run vision tower, fusion, projector and token embeddings once over all samples.

    The model is left as it was found: no gradient, evaluation mode only for the time of the call.

    Args:
        anatomy: the model under test.
        transform: from `make_transform`.
        tokenizer: called as `tokenizer(text, add_special_tokens=False)["input_ids"]`.
        samples: at least one.
        settings: `masked`, `text` and `max_text_tokens` are read.
        progress: show a bar.
        label: its name.

    Raises:
        InputError: no sample, or one with a bad image, box or text (named in the message).
        HostError: the tokens of this model have no pixels each, or are not finite.
    """
    if not len(samples):
        raise InputError(f"R-Probe got no {label}")
    texts, tokens, image_index, pixels, targets = [], [], [], [], []
    labels: list[tuple[str, str, str]] = []
    grid: TokenGrid | None = None
    previous: Sample | None = None
    images = 0
    bar = progress_bar(len(samples), f"encode {label}", progress)
    with bar, torch.inference_mode(False), torch.no_grad(), evaluation(anatomy.model):
        for start in range(0, len(samples), ENCODE_BATCH):
            batch = [samples[i] for i in range(start, min(start + ENCODE_BATCH, len(samples)))]
            originals = [sample.open_image() for sample in batch]
            true_pixels = transform.pixel_values(originals)
            fresh: list[int] = []  # places in this batch whose image the tower has not seen yet
            moved = [
                [transform.box(box, image.size, s.id) for box in s.boxes]
                for s, image in zip(batch, originals, strict=True)
            ]
            for place, sample in enumerate(batch):
                texts.append(_token_ids(sample, tokenizer, settings))
                labels.append((sample.id, sample.document or sample.id, sample.text))
                # Lines of one page follow each other: its tokens are computed once, unless each line is masked.
                if settings.masked or previous is None or previous.image is not sample.image:
                    fresh.append(place)
                    images += 1
                image_index.append(images - 1)
                previous = sample
            if fresh:
                seen = true_pixels[fresh]
                if settings.masked:
                    seen = transform.pixel_values([black_out(originals[i], batch[i].boxes) for i in fresh])
                tokens.append(_encode(anatomy, seen))
                if grid is None:
                    merge = merge_size(tokens[0].shape[1], *anatomy.grid)
                    rows, columns = (n // merge for n in anatomy.grid)
                    grid = TokenGrid(rows, columns, anatomy.patch_size * merge)
            assert grid is not None  # the first batch always brings an image
            target = torch.stack(
                [target_mask(torch.tensor(boxes, dtype=torch.float32), grid).any(0) for boxes in moved]
            )
            targets.append(target)
            pixels.append(patchify(true_pixels, grid)[target])
            bar.update(len(batch))
        assert grid is not None
        text_ids, text_counts, table = _text(anatomy, texts)
        return FrozenData(
            samples=samples,
            labels=labels,
            grid=grid,
            image_tokens=torch.cat(tokens),
            image_index=torch.tensor(image_index, dtype=torch.int64),
            target=torch.cat(targets),
            text_ids=text_ids,
            text_counts=text_counts,
            text_table=table,
            pixels=torch.cat(pixels),
        )


def _encode(anatomy: Anatomy, pixel_values: Tensor) -> Tensor:
    """Projected visual tokens, float32 [images, tokens, hidden] on CPU, sharing nothing with the model."""
    vision = anatomy.vision_model
    if vision is None:
        raise HostError("the vision tower is not loaded yet: call its load_model() first")
    weight = next(vision.parameters())
    dtype = next(anatomy.projector.parameters(), weight).dtype
    tokens = anatomy.encode_images(pixel_values.to(device=weight.device, dtype=dtype))
    tokens = tokens.detach().to(device="cpu", dtype=torch.float32, copy=True)
    if not torch.isfinite(tokens).all():
        raise HostError(f"the projected visual tokens are not finite (computed in {dtype}): load the model in float32")
    return tokens


def _token_ids(sample: Sample, tokenizer: Any, settings: RProbe) -> list[int]:
    ids = list(tokenizer(sample.text, add_special_tokens=False)["input_ids"])[: settings.max_text_tokens]
    if not ids:
        raise InputError(f"{sample.id}: the text {sample.text!r} has no tokens")
    if settings.text:
        return ids
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        raise SettingError("RProbe.text = False replaces text by the unknown token, but this tokenizer has none")
    return [int(unknown)] * len(ids)


def _text(anatomy: Anatomy, texts: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """(rows of the table [samples, width], counts [samples], float32 table [distinct tokens, hidden]), on CPU."""
    counts = torch.tensor([len(ids) for ids in texts], dtype=torch.int64)
    flat = torch.tensor([i for ids in texts for i in ids], dtype=torch.int64)
    weight = next(anatomy.embed_tokens.parameters())
    if int(flat.max()) >= weight.shape[0]:
        raise InputError(
            f"the tokenizer gives id {int(flat.max())}, the model embeds {weight.shape[0]} tokens: is it its tokenizer?"
        )
    distinct, row = flat.unique(return_inverse=True)
    table = anatomy.embed_tokens(distinct.to(weight.device)).detach().to(device="cpu", dtype=torch.float32, copy=True)
    padded = torch.zeros(len(texts), int(counts.max()), dtype=torch.int64)
    padded[torch.arange(padded.shape[1]) < counts[:, None]] = row
    return padded, counts, table


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time of the block; every module's own flag comes back, whatever happens."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, training in flags:
            module.training = training
