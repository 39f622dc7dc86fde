"""Run the vision tower once over all samples, and never again where a store on disk already holds its tokens.

What comes out, `FrozenData`, makes the batches that the probe trains on and is measured on.
"""

import functools
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llava_patch.core import parallel
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.files import digest
from llava_patch.core.terminal import progress_bar
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.passes import evaluating
from llava_patch.measurements.rprobe.keys import images_of, store_key
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.disk import Store
from llava_patch.measurements.rprobe.store.shard import SKIP, Record, Shard, encode
from llava_patch.probe.sample import DrawnSamples, Sample
from llava_patch.probe.sequence import ProbeSequence, TokenGrid, build_sequence
from llava_patch.probe.transform import Transform

SHARD_IMAGES = 32
"""Images a shard. They go through the tower together whoever encodes them, so every bit stays the same."""
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
    `texts_cut` counts those whose text was cut to `max_text_tokens`, `regions_cut` those whose window holds only the
    beginning of their region, and `notes` tell the user of all three. `key` is a digest of all that the
    batches depend on. The store, None in memory, stays in use as long as this lives.
    """

    samples: Sequence[Sample]
    labels: list[tuple[str, str, str]]
    shards: list[Shard]
    places: list[tuple[int, int]]
    text: Text
    skipped: list[str] = field(default_factory=list)
    texts_cut: int = 0
    regions_cut: int = 0
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

    def grid_of(self, index: int) -> TokenGrid:
        """Grid of a sample's image; with tiles (anyres) they have more or fewer cells, of one size."""
        shard, row = self.places[index]
        return self.shards[shard].grid(row)

    @property
    def grid(self) -> TokenGrid:
        """Grid of the first sample."""
        return self.grid_of(0)

    def cells_of(self, index: int) -> Tensor:
        """Cells (raster order) under the targets of a sample, int64 [targets], in the order of its pixels."""
        return self._rows("cells", index)[self._rows("target", index).long()].long()

    def seen_of(self, index: int) -> Tensor:
        """Cells (raster order) of a sample's image that have a token, bool [cells]; a host may drop some."""
        cells = self._rows("cells", index).long()
        seen = torch.zeros(self.grid_of(index).tokens, dtype=torch.bool)
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
            grid, cells, boxes = self.grid_of(i), self.cells_of(i), self._rows("boxes", i)
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
        counts = self.counts[index]
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


class Encoder(NamedTuple):
    """What samples are encoded with: the model under test, its image transform and its tokenizer."""

    anatomy: Anatomy
    transform: Transform
    tokenizer: Any


def freeze_samples(
    encoder: Encoder,
    samples: Sequence[Sample],
    settings: RProbe,
    progress: bool = False,
    label: str = "samples",
    warn: bool = True,
) -> FrozenData:
    """Run vision tower, fusion, projector and token embeddings once over all samples.

    The model is left as it was found: no gradient, evaluation mode only for the time of the call. With `settings.store`
    tokens lie on disk, where another run and other processes of this one find them: under `torch.distributed` every
    process calls this, takes shards that nobody else has taken, and returns when all are there. The numbers are the
    same bit for bit with and without a store.

    Raises:
        InputError: no usable sample, or, with `broken="stop"`, one with a bad image, box or text (it is named).
        HostError: the tokens of this model have no pixels each, or are not finite.
        SettingError: the tokens do not fit into `store_gb`, or on the disk.
        PeerError: another process of the run failed.
    """
    if not len(samples):
        raise InputError(f"R-Probe got no {label}")
    anatomy, transform, tokenizer = encoder
    own_precision = torch.autocast(next(anatomy.embed_tokens.parameters()).device.type, enabled=False)
    with parallel.guard(), torch.inference_mode(False), evaluating(anatomy.model), own_precision, ExitStack() as failed:
        plan = images_of(samples, settings, transform)
        known = plan.records or []
        # Before the long part, where texts are known before images are drawn.
        texts = _Texts(known, [samples[record.index].place for record in known], tokenizer, settings)
        described = store_key(anatomy, transform, plan.key, settings)
        images = [plan.images[i : i + SHARD_IMAGES] for i in range(0, len(plan.images), SHARD_IMAGES)]
        store = None
        if settings.store:
            model = str(getattr(anatomy.model.config, "_name_or_path", "") or type(anatomy.model).__name__)
            own = f"{len(samples)} samples of own data"
            data_name = own if plan.records is not None else str(plan.key.get("name", "drawn"))
            about = {"model": model, "data": data_name, "masked": settings.masked}
            store = Store(digest(described), len(images), about, settings.store_gb)
            failed.callback(store.close)
        with progress_bar(len(plan.images), f"R-Probe: encode {label}", progress) as bar:

            def make(number: int) -> Shard:
                return encode(anatomy, transform, samples, images[number], settings)

            def done(number: int) -> None:
                bar.update(len(images[number]))

            shards = [] if store is None else store.fill(make, done)
            for number in range(len(shards), len(images)):
                shards.append(make(number))
                done(number)
        stored = {record.index: (s, row) for s, shard in enumerate(shards) for row, record in enumerate(shard.records)}
        records = {r.index: r for r in plan.records or [record for shard in shards for record in shard.records]}
        if plan.records is None:
            texts = _Texts(records.values(), [record.id for record in records.values()], tokenizer, settings)
        messages = texts.messages | {index: message for shard in shards for index, message in shard.skipped}
        if messages and settings.broken == "stop":  # a store that was written with broken="skip"
            raise InputError(f"{messages[min(messages)]}; {SKIP}")
        kept = sorted(set(stored) - set(messages))
        skipped = [messages[index] for index in sorted(messages)]
        if not kept:
            raise InputError(f"R-Probe: none of the {len(samples)} {label} can be used; the first: {skipped[0]}")
        notes = []
        if skipped:
            notes.append(f"R-Probe leaves out {len(skipped)} of {len(samples)} {label}; the first: {skipped[0]}")
        if texts_cut := len(texts.cut.intersection(kept)):
            notes.append(
                f"R-Probe cuts the texts of {texts_cut} of {len(kept)} {label} to RProbe.max_text_tokens = "
                f"{settings.max_text_tokens} tokens: their regions are rebuilt without the rest of it"
            )
        if regions_cut := sum(shards[s].is_cut(row) for s, row in (stored[i] for i in kept)):
            notes.append(
                f"R-Probe shows only the beginning of the regions of {regions_cut} of {len(kept)} {label}: they are "
                f"larger than the window in which their text is RProbe.text_height = {settings.text_height:g} tokens "
                "high; their texts are given whole"
            )
        data = FrozenData(
            samples=Chosen(samples, kept) if skipped else samples,
            labels=[(records[i].id, records[i].document, records[i].text) for i in kept],
            shards=shards,
            places=[stored[i] for i in kept],
            text=_embedded(anatomy, [texts.ids[i] for i in kept]),
            skipped=skipped,
            texts_cut=texts_cut,
            regions_cut=regions_cut,
            notes=notes,
            key=digest([described, [(i, texts.ids[i]) for i in kept]]),
            store=store,
        )
        failed.pop_all()
    for note in data.notes if warn and parallel.rank() == 0 else ():
        warnings.warn(note, stacklevel=2)
    return data


class _Texts:
    """Token ids of the samples, by number, which texts were `cut`, and why one cannot be used (`messages`).

    They are cut to `max_text_tokens`, and all of unknown tokens where `settings.text` is False.
    """

    def __init__(self, records: Iterable[Record], names: Iterable[str], tokenizer: Any, settings: RProbe) -> None:
        self.ids: dict[int, list[int]] = {}
        self.cut: set[int] = set()
        self.messages: dict[int, str] = {}
        unknown = getattr(tokenizer, "unk_token_id", None)
        for record, name in zip(records, names, strict=True):
            found = list(tokenizer(record.text, add_special_tokens=False)["input_ids"])
            ids = found[: settings.max_text_tokens]
            if len(ids) < len(found):
                self.cut.add(record.index)
            if not ids:
                self.messages[record.index] = f"{name}: the text {record.text!r} has no tokens"
                if settings.broken == "stop":
                    raise InputError(f"{self.messages[record.index]}; {SKIP}")
            elif not settings.text:
                if unknown is None:
                    raise SettingError(
                        "RProbe.text = False replaces text by the unknown token, but this tokenizer has none"
                    )
                ids = [int(unknown)] * len(ids)
            self.ids[record.index] = ids


def _embedded(anatomy: Anatomy, texts: Sequence[list[int]]) -> Text:
    """Embed every distinct token once; an InputError where the model does not embed an id."""
    counts = torch.tensor([len(ids) for ids in texts], dtype=torch.int64)
    flat = torch.tensor([i for ids in texts for i in ids], dtype=torch.int64)
    weight = next(anatomy.embed_tokens.parameters())
    if int(flat.max()) >= weight.shape[0]:
        raise InputError(
            f"the tokenizer gives id {int(flat.max())}, the model embeds {weight.shape[0]} tokens: is it its tokenizer?"
        )
    distinct, row = flat.unique(return_inverse=True)
    table = anatomy.embed_tokens(distinct.to(weight.device)).detach().to(device="cpu", dtype=torch.float32, copy=True)
    return Text(pad_sequence(row.split(counts.tolist()), batch_first=True), counts, table)
