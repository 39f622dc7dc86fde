"""Where image and text tokens go: index sets of a ragged batch. Mathematics only."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class PositionSet:
    """Some positions of each sample, in order, left-padded to the longest sample."""

    index: Tensor  # int64 [batch, n] places in the full sequence; padding points at some other place of the same sample
    valid: Tensor | None  # bool [batch, n], False at padding; None when no sample needs padding

    @classmethod
    def run(cls, start: int, stop: int, batch: int, device: torch.device, valid: Tensor | None = None) -> "PositionSet":
        """The positions start..stop-1 of every sample; `valid` is bool [batch, stop - start], None without padding."""
        return cls(torch.arange(start, stop, device=device).expand(batch, -1), valid)

    def __len__(self) -> int:
        """Positions of a sample, padding included."""
        return self.index.shape[1]

    def take(self, values: Tensor) -> Tensor:
        """Gather rows: [batch or 1, tokens, channels] to [batch, n, channels]."""
        batch, n = self.index.shape
        index = self.index.to(values.device)
        if values.shape[0] == 1:
            return values[0].index_select(0, index.flatten()).view(batch, n, values.shape[-1])
        return _gather(values, index)

    def take_rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`take` for (cos, sin), each [batch or 1, tokens, head_dim]."""
        return self.take(rotary[0]), self.take(rotary[1])

    def shifted(self, offset: int) -> "PositionSet":
        """The same places in a sequence that has `offset` more positions in front."""
        return replace(self, index=self.index + offset) if offset else self

    def validity(self) -> Tensor:
        """`valid`, spelled out: bool [batch, n]."""
        return torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid

    def mask(self, tokens: int) -> Tensor:
        """Which of the sequence's positions are these: bool [batch, tokens]."""
        index = self.index if self.valid is None else self.index.where(self.valid, tokens)
        mask = torch.zeros(len(index), tokens + 1, dtype=torch.bool, device=index.device)
        return mask.scatter_(1, index, True)[:, :-1]

    def joined(self, later: "PositionSet") -> "PositionSet":
        """These places and then the later ones."""
        valid = None
        if self.valid is not None or later.valid is not None:
            valid = torch.cat([self.validity(), later.validity().to(self.index.device)], dim=1)
        return PositionSet(torch.cat([self.index, later.index.to(self.index.device)], dim=1), valid)

    def map(self, change: Callable[[Tensor], Tensor]) -> "PositionSet":
        """The same change on both tensors [batch, n], mostly of the batch dimension."""
        return PositionSet(change(self.index), None if self.valid is None else change(self.valid))


@dataclass(eq=False)
class KeyPositions:
    """The positions that layers of one kind hold: listed ones, then a run of further ones without padding.

    Decoding a token only lengthens the run; tensors are made where somebody looks at them.
    """

    listed: PositionSet  # places in the conversation
    run: int = 0  # how many places follow them
    end: int = 0  # the place behind the run

    def __len__(self) -> int:
        """Positions of a sample, padding included."""
        return len(self.listed) + self.run

    @property
    def padded(self) -> bool:
        """Whether any sample has padding."""
        return self.listed.valid is not None

    @property
    def places(self) -> PositionSet:
        """All of them, spelled out: places in the conversation."""
        if self.run:
            index = self.listed.index
            run = PositionSet.run(self.end - self.run, self.end, len(index), index.device)
            self.listed, self.run = self.listed.joined(run), 0
        return self.listed

    def add(self, new: PositionSet) -> None:
        """Add places behind."""
        self.listed = self.places.joined(new)

    def add_run(self, count: int, end: int) -> None:
        """Add the `count` places in front of `end`, none of them padding."""
        if self.run and self.end != end - count:
            self.listed, self.run = self.places, 0
        self.run, self.end = self.run + count, end

    def forget(self, count: int) -> None:
        """Take the last places away."""
        from_run = min(count, self.run)
        self.run, self.end = self.run - from_run, self.end - from_run
        if count > from_run:
            self.listed = self.listed.map(lambda x: x[:, : -(count - from_run)])

    def map(self, change: Callable[[Tensor], Tensor]) -> "KeyPositions":
        """The same change of the batch dimension on every tensor [batch, n]."""
        return KeyPositions(self.listed.map(change), self.run, self.end)


@dataclass(frozen=True)
class Counts:
    """What the host must know of a batch of masks; reading it costs one synchronisation."""

    image: tuple[int, ...]  # image positions of each sample
    text: tuple[int, ...]  # other valid positions of each sample
    image_end: int  # first column behind every sample's last image position
    suffix_valid: bool  # whether the last columns (as many as were asked about) are valid in every sample
    suffix_text: bool  # whether they are all text
    protected: tuple[int, ...]  # per sample, image positions that are read
    # The image and text positions as the host has read them, bool [batch, tokens]: what is worked out of them there
    # launches nothing on the device. None: they have been decided on the device since.
    masks: tuple[np.ndarray, np.ndarray] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, image_mask: Tensor, valid: Tensor | None, suffix: int = 1, protected: Tensor | None = None) -> "Counts":
        """Count a batch, with one synchronisation whatever its size.

        `image_mask`, `valid` (False at padding; None: no padding) and `protected` (positions that are read; None: none)
        are bool [batch, tokens]; `suffix_valid` and `suffix_text` speak of the last `suffix` columns.
        """
        read = [mask for mask in (image_mask, valid, protected) if mask is not None]
        image, *rest = torch.stack(read).cpu().numpy()
        here = np.ones_like(image) if valid is None else rest.pop(0)
        image = image & here
        text = here & ~image
        ends = (image * np.arange(1, image.shape[1] + 1)).max(1, initial=0)
        kept = np.zeros_like(image) if protected is None else rest.pop() & image
        return cls(
            tuple(image.sum(1).tolist()), tuple(text.sum(1).tolist()), int(ends.max()),
            bool(here[:, -suffix:].all()), bool(text[:, -suffix:].all()), tuple(kept.sum(1).tolist()), (image, text),
        )  # fmt: skip


@dataclass(frozen=True)
class RoutingPlan:
    """Image and text positions of a batch and the way back."""

    image: PositionSet  # the image positions
    text: PositionSet  # all other valid positions
    # int64 [batch, tokens], each position's row in the concatenation [image set ; text set]; padding of the input
    # points at row 0 (its content is never read).
    restore: Tensor

    def merge(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        """Put both streams back in order: [batch, n_image, d] and [batch, n_text, d] to [batch, tokens, d]."""
        rows = torch.cat([image_states, text_states.to(image_states.device)], dim=1)
        return _gather(rows, self.restore.to(rows.device))

    def merge_heads(self, image_states: Tensor, text_states: Tensor) -> Tensor:
        """`merge` for keys and values: [batch, heads, n, head_dim]."""
        rows = torch.cat([image_states, text_states], dim=2)
        index = self.restore.to(rows.device)[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3])
        return rows.gather(2, index)


def make_plan(image_mask: Tensor, valid: Tensor | None, counts: Counts | None = None) -> RoutingPlan:
    """Split a batch into image and text positions by bool [batch, tokens]; `valid` is False at padding, None without.

    `counts` is what `Counts.of` says of the two masks, when the caller knows it already. Where it holds the masks, the
    plan is made on the host and copied at once, else on their device.
    """
    counts = Counts.of(image_mask, valid) if counts is None else counts
    if counts.masks is not None:
        image, text = counts.masks
        indices = _places(image, counts.image), _places(text, counts.text)
        rows = _rows(image, text, counts, np.where)
        packed = torch.from_numpy(np.concatenate([*indices, rows], axis=1)).to(image_mask.device)
        at = indices[0].shape[1], indices[1].shape[1], rows.shape[1]
        images, texts, restore = packed.split(at, dim=1)
        return RoutingPlan(
            PositionSet(images, _valid(counts.image, image_mask.device)),
            PositionSet(texts, _valid(counts.text, image_mask.device)),
            restore,
        )
    valid = torch.ones_like(image_mask) if valid is None else valid
    image_mask = image_mask & valid
    text_mask = valid & ~image_mask
    restore = _rows(image_mask, text_mask, counts, torch.where)
    return RoutingPlan(positions(image_mask, counts.image), positions(text_mask, counts.text), restore)


def _rows(image: Any, text: Any, counts: Counts, where: Callable[..., Any]) -> Any:
    """`RoutingPlan.restore` of masks on the host or on a device; sets are left-padded to the longest sample's."""
    n_image, n_text = max(counts.image), max(counts.text)
    image_row, text_row = image.cumsum(1), text.cumsum(1)
    image_row = image_row - 1 + (n_image - image_row[:, -1:])
    text_row = text_row - 1 + (n_text - text_row[:, -1:]) + n_image
    return where(image, image_row, where(text, text_row, 0))


def positions(mask: Tensor, counts: tuple[int, ...]) -> PositionSet:
    """The places where a mask, bool [batch, tokens], is set; `counts`: how many there are in each sample."""
    # A stable sort of 0/1 puts the wanted places last and keeps their order.
    index = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, mask.shape[1] - max(counts) :]
    return PositionSet(index, _valid(counts, mask.device))


def _places(mask: np.ndarray, counts: tuple[int, ...]) -> np.ndarray:
    """The index of `positions`, on the host."""
    return mask.argsort(axis=1, kind="stable")[:, mask.shape[1] - max(counts) :]


def _valid(counts: tuple[int, ...], device: torch.device) -> Tensor | None:
    """Which places of sets of these sizes are no padding; None: all."""
    n = max(counts)
    if min(counts) == n:
        return None
    return torch.from_numpy(np.arange(n) >= n - np.array(counts)[:, None]).to(device)


def passed(masks: list[Tensor]) -> Tensor:
    """How many stages of a pruning each position has passed: int64 [batch, tokens], but of one stage its mask, bool.

    `masks` are bool [batch, tokens], what each stage has left.
    """
    return masks[0] if len(masks) == 1 else torch.stack(masks).sum(0)


def put_back(base: Tensor, kept: PositionSet, states: Tensor) -> Tensor:
    """Overwrite some positions: [batch, tokens, d], `base` with `states` [batch, n, d] at its n places `kept`."""
    tokens = base.shape[1]
    row = torch.arange(tokens, device=base.device).expand(base.shape[0], -1)
    index, new = kept.index.to(base.device), tokens + torch.arange(len(kept), device=base.device)
    # Padding points at places that must keep their row: send it to a column that is cut off again.
    index = index if kept.valid is None else torch.where(kept.valid.to(base.device), index, tokens)
    row = torch.cat([row, row[:, :1]], dim=1).scatter(1, index, new.expand_as(index))[:, :tokens]
    return _gather(torch.cat([base, states.to(base.device)], dim=1), row)


def _gather(values: Tensor, index: Tensor) -> Tensor:
    # One flat index_select: on CPU and in backward cheaper than gather with an index of [batch, n, channels].
    batch, n = index.shape
    if batch == 1:
        return values[0].index_select(0, index[0])[None]
    offset = torch.arange(batch, device=index.device)[:, None] * values.shape[1]
    return values.flatten(0, 1).index_select(0, (index + offset).flatten()).view(batch, n, values.shape[-1])
