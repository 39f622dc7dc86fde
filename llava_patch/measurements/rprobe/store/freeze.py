"""Run the vision tower once over all samples, and never again where a store on disk already holds its tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llava_patch.core import parallel
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.files import digest
from llava_patch.core.terminal import progress_bar
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.rprobe.contents import ImagesOfData, images_of
from llava_patch.measurements.rprobe.keys import store_key
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.measurements.rprobe.store.data import Chosen, FrozenData, Text
from llava_patch.measurements.rprobe.store.disk import Store
from llava_patch.measurements.rprobe.store.shard import Record, Shard, encode
from llava_patch.probe.sample import Sample
from llava_patch.probe.transform import Transform

SHARD_IMAGES = 32
"""Images a shard. They go through the tower together whoever encodes them, so every bit stays the same."""


def freeze_samples(
    anatomy: Anatomy,
    transform: Transform,
    tokenizer: Any,
    samples: Sequence[Sample],
    settings: RProbe,
    progress: bool = False,
    label: str = "samples",
    warn: bool = True,
) -> FrozenData:
    """Run vision tower, fusion, projector and token embeddings once over all samples.

    The model is left as it was found: no gradient, evaluation mode only for the time of the call. With
    `settings.store` the tokens lie on disk; there another run, and other processes of this one, find them: under
    `torch.distributed` every process calls this, takes shards that nobody else has taken, and returns when all are
    there. The numbers are the same bit for bit with and without a store.

    Raises:
        InputError: no usable sample, or, with `broken="stop"`, one with a bad image, box or text (it is named).
        HostError: the tokens of this model have no pixels each, or are not finite.
        SettingError: the tokens do not fit into `store_gb`, or on the disk.
        PeerError: another process of the run failed.
    """
    if not len(samples):
        raise InputError(f"R-Probe got no {label}")
    with parallel.guard(), torch.inference_mode(False), torch.no_grad():
        plan = images_of(samples, settings)
        texts = _Texts(tokenizer, settings)
        if plan.records is not None:  # before the long part, where texts are known before images are drawn
            texts.read(plan.records, [samples[record.index].place for record in plan.records])
        with _as_measured(anatomy):
            described = store_key(anatomy, transform, plan.key, settings)
        images = [plan.images[i : i + SHARD_IMAGES] for i in range(0, len(plan.images), SHARD_IMAGES)]

        def make(number: int) -> Shard:
            with _as_measured(anatomy):
                return encode(anatomy, transform, samples, images[number], settings)

        with contextlib.ExitStack() as on_failure:
            store = None
            if settings.store:
                model = str(getattr(anatomy.model.config, "_name_or_path", "") or type(anatomy.model).__name__)
                own = f"{len(samples)} samples of own data"
                data_name = own if plan.records is not None else str(plan.key.get("name", "drawn"))
                about = {"model": model, "data": data_name, "masked": settings.masked}
                store = Store(digest(described), len(images), about, settings.store_gb)
                on_failure.callback(store.close)
            with progress_bar(len(plan.images), f"R-Probe: encode {label}", progress) as bar:

                def done(number: int) -> None:
                    bar.update(len(images[number]))

                shards = [] if store is None else store.fill(make, done)
                for number in range(len(shards), len(images)):
                    shards.append(make(number))
                    done(number)
            data = _frozen(anatomy, samples, plan, texts, shards, described, label, store)
            on_failure.pop_all()
    if warn and parallel.rank() == 0:
        for note in data.notes:
            warnings.warn(note, stacklevel=2)
    return data


class _Texts:
    """Token ids of samples' texts, by the samples' numbers; what cannot be used stops the reading, or is noted."""

    def __init__(self, tokenizer: Any, settings: RProbe) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.ids: dict[int, list[int]] = {}
        self.cut: set[int] = set()
        self.messages: dict[int, str] = {}

    def read(self, records: Sequence[Record], names: Sequence[str]) -> None:
        for record, name in zip(records, names, strict=True):
            try:
                self.ids[record.index], whole = token_ids(record.text, name, self.tokenizer, self.settings)
                if not whole:
                    self.cut.add(record.index)
            except InputError as error:
                if self.settings.broken == "stop":
                    raise
                self.messages[record.index] = str(error)


def _frozen(
    anatomy: Anatomy,
    samples: Sequence[Sample],
    plan: ImagesOfData,
    texts: _Texts,
    shards: list[Shard],
    described: dict[str, Any],
    label: str,
    store: Store | None,
) -> FrozenData:
    """Join what was encoded, now or by an earlier run, with the texts; samples that cannot be used are left out."""
    settings = texts.settings
    messages = texts.messages | {index: message for shard in shards for index, message in shard.skipped}
    if messages and settings.broken == "stop":  # a store that was written with broken="skip"
        raise InputError(messages[min(messages)])
    stored = [(record, (s, row)) for s, shard in enumerate(shards) for row, record in enumerate(shard.records)]
    places = {record.index: place for record, place in stored}
    records = {record.index: record for record in plan.records or [record for record, _ in stored]}
    if plan.records is None:
        texts.read([record for record, _ in stored], [record.id for record, _ in stored])
        messages |= texts.messages
    kept = sorted(set(places) - set(messages))
    skipped = [messages[index] for index in sorted(messages)]
    if not kept:
        raise InputError(f"R-Probe: none of the {len(samples)} {label} can be used; the first: {skipped[0]}")
    notes = []
    if skipped:
        notes.append(f"R-Probe leaves out {len(skipped)} of {len(samples)} {label}; the first: {skipped[0]}")
    texts_cut = len(texts.cut.intersection(kept))
    if texts_cut:
        notes.append(
            f"R-Probe cuts the texts of {texts_cut} of {len(kept)} {label} to RProbe.max_text_tokens = "
            f"{settings.max_text_tokens} tokens: their regions are rebuilt without the rest of it"
        )
    return FrozenData(
        samples=Chosen(samples, kept) if skipped else samples,
        labels=[(records[i].id, records[i].document, records[i].text) for i in kept],
        shards=shards,
        places=[places[i] for i in kept],
        text=embed(anatomy, [texts.ids[i] for i in kept]),
        skipped=skipped,
        texts_cut=texts_cut,
        notes=notes,
        key=digest([described, [(i, texts.ids[i]) for i in kept]]),
        store=store,
    )


def token_ids(text: str, name: str, tokenizer: Any, settings: RProbe) -> tuple[list[int], bool]:
    """Ids of a text, cut to `max_text_tokens`, and whether they are all; unknown tokens if `settings.text` is False."""
    found = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = found[: settings.max_text_tokens]
    whole = len(ids) == len(found)
    if not ids:
        raise InputError(f"{name}: the text {text!r} has no tokens")
    if settings.text:
        return ids, whole
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        raise SettingError("RProbe.text = False replaces text by the unknown token, but this tokenizer has none")
    return [int(unknown)] * len(ids), whole


def embed(anatomy: Anatomy, texts: Sequence[list[int]]) -> Text:
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
    padded = torch.zeros(len(texts), int(counts.max()), dtype=torch.int64)
    padded[torch.arange(padded.shape[1]) < counts[:, None]] = row
    return Text(padded, counts, table)


@contextlib.contextmanager
def _as_measured(anatomy: Anatomy) -> Iterator[None]:
    """Evaluation mode, and the model's own precision; every module's own flag comes back, whatever happens."""
    device = next(anatomy.embed_tokens.parameters()).device
    flags = [(module, module.training) for module in anatomy.model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, training in flags:
            module.training = training
