"""What the probe trains on and is measured on: batches out of shards that lie in memory or on disk."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_patch.measurements.rprobe.store.disk import Store
from llava_patch.measurements.rprobe.store.shard import Shard
from llava_patch.probe.sample import DrawnSamples, Sample
from llava_patch.probe.sequence import ProbeSequence, TokenGrid, build_sequence

CHUNK = 256  # samples whose pixels are in memory at once while means are taken


@dataclass(frozen=True, eq=False)
class Text:
    """Frozen text of many samples, on CPU.

    `ids` are int64 [samples, width], rows of `table`, padded with 0; `counts` int64 [samples]; `table` is float32
    [distinct tokens, hidden].
    """

    ids: Tensor
    counts: Tensor
    table: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs and targets of one step, on the probe's device, as `ProbeDecoder.forward` takes them.

    Tokens are padded at the end; `pixels` are float32 [targets, pixels], in the order in which the decoder answers, and
    `counts` int64 [batch] the targets of each sample.
    """

    image_tokens: Tensor
    text_tokens: Tensor
    sequence: ProbeSequence
    pixels: Tensor
    counts: Tensor
    injections: Tensor | None = None


class Chosen(DrawnSamples):
    """Some samples of a sequence, by their numbers."""

    def __init__(self, samples: Sequence[Sample], numbers: Sequence[int]) -> None:
        self._samples, self._numbers = samples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def draw(self, index: int) -> Sample:
        """Of those that were chosen."""
        return self._samples[self._numbers[index]]


@dataclass(frozen=True, eq=False)
class FrozenData:
    """The frozen inputs of many samples, on CPU; image tokens and pixels may be mapped from disk.

    `samples` are where they came from (pages are drawn anew when they are asked for), `labels` each one's (id,
    document, text), `places` its (shard, row in it). `skipped` has a message for each sample that was left out,
    `texts_cut` counts those whose text was cut to `max_text_tokens`, and `notes` tell the user of both. `key` is a
    digest of all that the batches depend on. The store, None in memory, stays in use as long as this lives.
    """

    samples: Sequence[Sample]
    labels: list[tuple[str, str, str]]
    shards: list[Shard]
    places: list[tuple[int, int]]
    text: Text
    skipped: list[str] = field(default_factory=list)
    texts_cut: int = 0
    notes: list[str] = field(default_factory=list)
    key: str = ""
    store: Store | None = None

    def __len__(self) -> int:
        return len(self.places)

    def _rows(self, name: str, index: int) -> Tensor:
        """A sample's part of one of the tensors of its shard; shapes as in `Shard.tensors`."""
        shard, row = self.places[index]
        return self.shards[shard].rows(name, row)

    @functools.cached_property
    def counts(self) -> Tensor:
        """Targets of each sample, int64 [samples]."""
        by_shard = [shard.tensors["target_counts"].tolist() for shard in self.shards]
        return torch.tensor([by_shard[shard][row] for shard, row in self.places], dtype=torch.int64)

    @property
    def grid(self) -> TokenGrid:
        """Grid of the first sample; with tiles (anyres) others may have more or fewer cells, of the same size."""
        return self._grid_of(0)

    def _grid_of(self, index: int) -> TokenGrid:
        shard, row = self.places[index]
        return self.shards[shard].grid(row)

    def cells_of(self, index: int) -> Tensor:
        """Cells (raster order) under the targets of a sample, int64 [targets], in the order of its pixels."""
        return self._rows("cells", index)[self._rows("target", index).long()].long()

    def seen_of(self, index: int) -> Tensor:
        """Cells (raster order) of a sample's image that have a token, bool [cells]; a host may drop some."""
        cells = self._rows("cells", index).long()
        seen = torch.zeros(self._grid_of(index).tokens, dtype=torch.bool)
        seen[cells[cells >= 0]] = True
        return seen

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, float]:
        """Mean and mean population variance of the targets: one pass in float64, joined as Chan et al. (1979) do."""
        count, mean, squares = 0, torch.zeros(self.grid.pixels, dtype=torch.float64), 0.0
        for part in torch.arange(len(self)).split(CHUNK):
            pixels = torch.cat([self._rows("pixels", i) for i in part.tolist()]).double()
            here = pixels.mean(0)
            apart = here - mean
            whole = count + len(pixels)
            squares += float((pixels - here).square().sum() + apart.square().sum() * (count * len(pixels) / whole))
            mean += apart * (len(pixels) / whole)
            count = whole
        return mean, squares / (count * self.grid.pixels)

    @property
    def target_mean(self) -> Tensor:
        """Mean target, float32 [pixels]."""
        return self._moments[0].float()

    @property
    def target_variance(self) -> float:
        """Population variance of each pixel over all targets, mean over pixels."""
        return self._moments[1]

    def inside(self, index: Tensor) -> Tensor:
        """Which pixels under the targets lie in a text box of their image (their centre does).

        `index` is int64 [batch] on CPU; the result bool [targets, cell x cell], in the order of `Batch.pixels`.
        """
        found = []
        for i in index.tolist():
            grid, cells, boxes = self._grid_of(i), self.cells_of(i), self._rows("boxes", i)
            centre = torch.arange(grid.cell) + 0.5
            within = []  # rows, then columns: bool [targets, cell, boxes]
            for first, low in ((cells // grid.columns, 1), (cells % grid.columns, 0)):
                at = (first[:, None] * grid.cell + centre)[..., None]
                within.append((at >= boxes[:, low]) & (at < boxes[:, low + 2]))
            found.append((within[0][:, :, None] & within[1][:, None]).any(-1).flatten(1))
        return torch.cat(found)

    def batch(self, index: Tensor, device: torch.device | str = "cpu") -> Batch:
        """The samples of `index` (int64 [batch], on CPU).

        Tokens become float32, which is exact for every dtype that a model runs in.
        """
        numbers = index.tolist()

        def rows(name: str) -> list[Tensor]:
            return [self._rows(name, i) for i in numbers]

        pin = torch.device(device).type == "cuda"  # a copy from pinned memory does not hold up the host

        def moved(values: Tensor) -> Tensor:
            return (values.pin_memory() if pin else values).to(device, non_blocking=pin)

        shards = [(self.shards[shard], row) for shard, row in (self.places[i] for i in numbers)]
        tokens, targets = pad_sequence(rows("tokens"), batch_first=True), rows("target")
        widths = torch.tensor([len(cells) for cells in rows("cells")])
        counts = torch.tensor([len(t) for t in targets])
        target = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        target[torch.arange(len(numbers)).repeat_interleave(counts), torch.cat(targets).long()] = True
        injections = None
        if "injections" in shards[0][0].tensors:
            added = moved(pad_sequence(rows("injections"), batch_first=True))
            injections = added.float().transpose(1, 2).contiguous()
        known = torch.arange(tokens.shape[1]) < widths[:, None]
        positions = pad_sequence(rows("positions"), batch_first=True)
        start = torch.tensor([shard.text_start(row) for shard, row in shards])
        text_counts = self.text.counts[index]
        text = self.text.table[self.text.ids[index, : int(text_counts.max())]]
        sequence = build_sequence(target, known, positions, text_counts, start, text.shape[1]).to(device)
        pixels = moved(torch.cat(rows("pixels")))
        return Batch(moved(tokens).float(), text.to(device), sequence, pixels, counts.to(device), injections)
