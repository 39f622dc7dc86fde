"""Run the vision tower once over all samples, and never again where a store on disk already holds its tokens."""

import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch

from llava_patch.core import parallel
from llava_patch.core.errors import InputError, SettingError
from llava_patch.core.files import digest
from llava_patch.core.terminal import progress_bar
from llava_patch.hosts.anatomy import Anatomy
from llava_patch.measurements.passes import evaluating
from llava_patch.measurements.rprobe.keys import images_of, store_key
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
    own_precision = torch.autocast(next(anatomy.embed_tokens.parameters()).device.type, enabled=False)
    with parallel.guard(), torch.inference_mode(False), evaluating(anatomy.model), own_precision, ExitStack() as failed:
        plan = images_of(samples, settings)
        texts = _Texts({}, {}, {})
        if plan.records is not None:  # before the long part, where texts are known before images are drawn
            texts = _read(plan.records, [samples[record.index].place for record in plan.records], tokenizer, settings)
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
            texts = _read(records.values(), [record.id for record in records.values()], tokenizer, settings)
        messages = texts.messages | {index: message for shard in shards for index, message in shard.skipped}
        if messages and settings.broken == "stop":  # a store that was written with broken="skip"
            raise InputError(messages[min(messages)])
        kept = sorted(set(stored) - set(messages))
        skipped = [messages[index] for index in sorted(messages)]
        if not kept:
            raise InputError(f"R-Probe: none of the {len(samples)} {label} can be used; the first: {skipped[0]}")
        notes = []
        if skipped:
            notes.append(f"R-Probe leaves out {len(skipped)} of {len(samples)} {label}; the first: {skipped[0]}")
        if texts_cut := sum(texts.cut[index] for index in kept):
            notes.append(
                f"R-Probe cuts the texts of {texts_cut} of {len(kept)} {label} to RProbe.max_text_tokens = "
                f"{settings.max_text_tokens} tokens: their regions are rebuilt without the rest of it"
            )
        data = FrozenData(
            samples=Chosen(samples, kept) if skipped else samples,
            labels=[(records[i].id, records[i].document, records[i].text) for i in kept],
            shards=shards,
            places=[stored[i] for i in kept],
            text=_embedded(anatomy, [texts.ids[i] for i in kept]),
            skipped=skipped,
            texts_cut=texts_cut,
            notes=notes,
            key=digest([described, [(i, texts.ids[i]) for i in kept]]),
            store=store,
        )
        failed.pop_all()
    for note in data.notes if warn and parallel.rank() == 0 else ():
        warnings.warn(note, stacklevel=2)
    return data


class _Texts(NamedTuple):
    """Of the samples, by number: token ids, whether they were cut, and why a text cannot be used."""

    ids: dict[int, list[int]]
    cut: dict[int, bool]
    messages: dict[int, str]


def _read(records: Iterable[Record], names: Sequence[str], tokenizer: Any, settings: RProbe) -> _Texts:
    """Texts are cut to `max_text_tokens`, and all of unknown tokens where `settings.text` is False."""
    texts, unknown = _Texts({}, {}, {}), getattr(tokenizer, "unk_token_id", None)
    for record, name in zip(records, names, strict=True):
        found = list(tokenizer(record.text, add_special_tokens=False)["input_ids"])
        ids = found[: settings.max_text_tokens]
        if not ids:
            texts.messages[record.index] = f"{name}: the text {record.text!r} has no tokens"
            if settings.broken == "stop":
                raise InputError(texts.messages[record.index])
        elif not settings.text:
            if unknown is None:
                raise SettingError(
                    "RProbe.text = False replaces text by the unknown token, but this tokenizer has none"
                )
            ids = [int(unknown)] * len(ids)
        texts.ids[record.index], texts.cut[record.index] = ids, len(ids) < len(found)
    return texts


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
    padded = torch.zeros(len(texts), int(counts.max()), dtype=torch.int64)
    padded[torch.arange(padded.shape[1]) < counts[:, None]] = row
    return Text(padded, counts, table)
