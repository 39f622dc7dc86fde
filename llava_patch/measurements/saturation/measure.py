"""Measures visual saturation: one forward pass a sample, means over samples.

An unfinished measurement lies on disk: the sums so far and what they belong to. One of another model, other data or
other settings is never taken up; the message names what differs.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_patch.core import files
from llava_patch.core.errors import CheckpointError, InputError, shown
from llava_patch.core.stored import read_tensors_and_metadata
from llava_patch.core.terminal import how_many, say_cost
from llava_patch.data.examples import Example
from llava_patch.hosts import wrappers
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.measurements import passes, trace
from llava_patch.measurements.saturation.knockout import knock_out
from llava_patch.measurements.saturation.result import DEFAULTS, SQUARES, Curves, PatchOn, Saturation, SaturationResult
from llava_patch.patching.handle import get_handle
from llava_patch.patching.keys import model_digest

NO_IMAGE, NO_TEXT = "no image", "no text after the image"
STATE_FILE = "saturation.state.safetensors"
FORMAT = 3  # 1: the model's key saw matrices only; 2: without VTW's curve
_MEANING = {
    "model": "the model is another one (weights, configuration or patch)",
    "data": "the samples are others (images, questions or their order)",
}


def unusable(anatomy: Anatomy, sample: dict[str, Any]) -> str | None:
    """Why a sample cannot be measured; None when it can."""
    if not passes.has_image(anatomy, sample):
        return NO_IMAGE
    return None if len(trace.text_after_image(wrappers.placeholders(anatomy, sample["input_ids"])[0])) else NO_TEXT


def patch_on(anatomy: Anatomy) -> PatchOn | None:
    """What a patch does to the image positions of a model; None: nothing."""
    handle = get_handle(anatomy.model)
    program = None if handle is None else handle.program()
    if handle is None or program is None or not program.leaves_out:
        return None
    words = []
    split = program.split if program.split < program.n_layers else None
    if split is not None and handle.routing is not None:
        words.append(f"routed ({handle.routing.variant}, split {split})")
    if (pruning := program.pruning) is not None:
        words.append(f"pruned ({type(pruning).__name__}, {pruning.described})")
    return PatchOn(split, program.prune_at, " and ".join(words))


def measure_sample(anatomy: Anatomy, sample: dict[str, Any], settings: Saturation = DEFAULTS) -> Curves:
    """Measure one usable sample, a batch of one without padding: one forward pass of the model, and the knock-out.

    Raises:
        HostError: numbers that are not finite; names the first layer that has them.
    """
    layers = range(len(anatomy.layers))
    with passes.evaluating(anatomy.model):
        with trace.traced(anatomy, sample, settings.chunk) as seen:
            passes.run(anatomy, sample)
        image_kl, text_kl, answer_kl = trace.lens_kl(anatomy, seen, settings.chunk)
        # A routed or pruned model has taken the image away itself.
        knocked = knock_out(anatomy, seen, settings.chunk) if _knocks_out(anatomy, settings) else None

    def together(values: dict[int, torch.Tensor]) -> list:
        """One transfer from the device."""
        return torch.stack([values[i].to(values[0].device) for i in layers]).tolist()

    curves = Curves(
        image_cosine=together(seen.image_cosine),
        text_cosine=together(seen.text_cosine),
        head_mass=together(seen.mass),
        image_kl=image_kl,
        text_kl=text_kl,
        image_states=[float(seen.image_states(i)) for i in layers],
        image_keys=[float(seen.image_keys(i)) for i in layers],
        peak=[max(heads) for heads in together(seen.peak)],
        answer_kl=answer_kl,
        **({} if knocked is None else asdict(knocked)),
        **({} if knocked is None else {SQUARES[n]: [v * v for v in getattr(knocked, n)] for n in SQUARES}),
    )
    # NaN stands for absent positions in the curves: what overflowed must not be taken for that. All layers' states come
    # before the logit lens, which holds each layer against the last one.
    there = [bool(states) for states in curves.image_states]
    for layer in layers:
        own = [curves.image_cosine[layer]] * there[layer]
        passes.check_finite([*curves.head_mass[layer], curves.text_cosine[layer], *own], layer, anatomy)
    for layer in layers:
        own = [curves.image_kl[layer]] * (there[layer] and there[-1])
        lost = [curves.withdrawn_kl[layer], curves.fused_kl[layer]] * (knocked is not None)
        passes.check_finite([curves.text_kl[layer], *own, *lost], layer, anatomy)
    return curves


def make_key(anatomy: Anatomy, examples: Sequence[Example], settings: Saturation) -> dict[str, Any]:
    """All that a measurement's numbers depend on, as flat JSON values; the order of the examples counts."""
    parameter = next(anatomy.layers[0].parameters())
    digest = hashlib.sha256()
    for example in examples:
        image = example.image
        if isinstance(image, Image.Image):
            digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
        elif isinstance(image, (str, Path)):
            path = Path(image)
            stat = path.stat() if path.exists() else None  # a missing file has its own error when it is opened
            digest.update(repr((str(path.resolve()), stat and (stat.st_size, stat.st_mtime_ns))).encode())
        else:
            digest.update(str(image).encode())
        digest.update(repr((example.id, example.question)).encode())
    return {
        **{f"Saturation.{k}": v for k, v in asdict(settings).items() if k != "save_every"},
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
        "attention": str(anatomy.text_config._attn_implementation),
        "version of torch": torch.__version__,
        "version of transformers": version("transformers"),
        "model": model_digest(anatomy),
        "data": digest.hexdigest(),
    }


@dataclass(frozen=True)
class RunningMean:
    """Sums over samples, each of which counts the same: memory does not grow with their number.

    Never changed in place, so that a signal between two samples cannot leave one counted in half.
    """

    samples: int = 0  # how many were added
    skipped: dict[str, int] = field(default_factory=dict)  # how many were left out, by reason
    # float64 [layers] or [layers, heads], by the curve's name: sums, and int64 how many values each has; no NaN counts.
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> int:
        """Number of samples looked at, those left out included."""
        return self.samples + sum(self.skipped.values())

    def plus(self, curves: Curves) -> "RunningMean":
        """With one more sample."""
        sums, counts = {}, {}
        for name, values in asdict(curves).items():
            new = torch.tensor(values, dtype=torch.float64)
            known = ~new.isnan()
            sums[name] = self.sums.get(name, 0) + torch.where(known, new, 0.0)
            counts[name] = self.counts.get(name, 0) + known.long()
        return replace(self, samples=self.samples + 1, sums=sums, counts=counts)

    def without(self, reason: str) -> "RunningMean":
        """With one more sample that was left out."""
        return replace(self, skipped={**self.skipped, reason: self.skipped.get(reason, 0) + 1})

    def check(self) -> None:
        """Raise a ValueError where these are no sums of as many samples as they say."""
        wanted = {f.name for f in fields(Curves)} if self.samples else set()
        layers = {len(sums) for sums in self.sums.values() if sums.dim()}
        checked = (
            ("curves", set(self.sums) == set(self.counts) == wanted and len(layers) == len({*wanted} and {1})),
            ("shapes", all(sums.shape == self.counts[name].shape for name, sums in self.sums.items())),
            ("dimensions", all(sums.dim() == 1 + (name == "head_mass") for name, sums in self.sums.items())),
            ("sums", all(s.dtype == torch.float64 and bool(s.isfinite().all()) for s in self.sums.values())),
            ("counts", all(c.dtype == torch.int64 and 0 <= int(c.min()) <= int(c.max()) <= self.samples
                           for c in self.counts.values() if c.numel())),
            ("numbers", all(_is_count(count) for count in (self.samples, *self.skipped.values()))),
        )  # fmt: skip
        if wrong := [what for what, holds in checked if not holds]:
            raise ValueError(f"its {wrong[0]} are none")

    def mean(self) -> Curves:
        """Mean of what was added; 0 / 0 is NaN, which stands for absent."""
        return Curves(**{name: (self.sums[name] / self.counts[name]).tolist() for name in self.sums})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


@dataclass(frozen=True)
class State:
    """Where an unfinished measurement is kept."""

    path: Path  # of the file; its folder is made when something is written
    key: dict[str, Any]  # from `make_key`, or any flat JSON values that say what the sums belong to

    def load(self) -> RunningMean | None:
        """The sums so far; None when there is no file. CheckpointError: another measurement's, or a broken one."""
        if not self.path.is_file():
            return None
        tensors, metadata = read_tensors_and_metadata(self.path, advice=": delete it to start over")
        try:
            header = json.loads(metadata["llava_patch"])
            if header["format"] != FORMAT:
                what = f"format {shown(header['format'])}, this version reads {FORMAT}"
                raise CheckpointError(f"{self.path}: {what}: delete the file to start over")
            parts: dict[str, dict[str, Tensor]] = {"sums": {}, "counts": {}}
            for name, tensor in tensors.items():
                kind, _, curve = name.partition(".")
                parts[kind][curve] = tensor
            found = RunningMean(int(header["samples"]), dict(header["skipped"]), **parts)
            saved = dict(header["key"])
            found.check()
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: not a state of this measurement, or broken ({error!r}): delete it to start over"
            ) from error
        for name in [*self.key, *(name for name in saved if name not in self.key)]:
            was, here = saved.get(name), self.key.get(name)
            if was != here:
                differs = _MEANING.get(name) or f"{name} was {shown(was)} there and is {shown(here)} here"
                raise CheckpointError(
                    f"{self.path}: an unfinished measurement of another kind: {differs}. Give what it was started "
                    "with, another folder, or delete the file to start over"
                )
        return found

    def save(self, done: RunningMean) -> None:
        """Write the sums in one file, which replaces the last one whole."""
        for path in self.path.parent.glob(f".{self.path.stem}-*"):  # what a killed process left half written
            path.unlink(missing_ok=True)
        tensors = {f"sums.{k}": v for k, v in done.sums.items()} | {f"counts.{k}": v for k, v in done.counts.items()}
        header = {"format": FORMAT, "key": self.key, "samples": done.samples, "skipped": done.skipped}
        with files.atomic(self.path) as part:
            save_file(tensors, part, metadata={"llava_patch": json.dumps(header)})

    def remove(self) -> None:
        """Delete the file, once the result is written."""
        self.path.unlink(missing_ok=True)


def _knocks_out(anatomy: Anatomy, settings: Saturation) -> bool:
    return settings.knockout is not False and patch_on(anatomy) is None


def measure_saturation(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    settings: Saturation = DEFAULTS,
    progress: bool = True,
    state: State | None = None,
) -> SaturationResult:
    """Measure visual saturation of a stock or patched model.

    Args:
        model: a model of either host, possibly wrapped (DDP, peft).
        samples: keyword arguments of the model's forward, each a batch of one without padding, on the model's device.
            `llava`: input_ids with the placeholder of -200, images; HF: input_ids, pixel_values, attention_mask.
        settings: see `Saturation`.
        progress: show a progress bar on stderr.
        state: where an unfinished run is kept; the same samples again then go on behind those that it has, and the
            result is the same to the last bit. Call its `remove()` once the result is written.

    Returns:
        The mean over samples. In layers that a patched model runs without image positions, attention mass is 0 by
        definition and image values are NaN; in the KV variant's deep layers mass is that on the side branch's keys.
        Pruned image positions count up to the layer that they leave at, and not in the logit lens.

    Raises:
        InputError: no usable sample, a batch, padding.
        HostError: numbers that are not finite.
        CheckpointError: the state belongs to another measurement.
    """
    anatomy = find(model)
    patch = patch_on(anatomy)
    done = (None if state is None else state.load()) or RunningMean(skipped={NO_IMAGE: 0, NO_TEXT: 0})
    kept = done.seen
    rest: Any = samples
    if kept:
        rest = samples[kept:] if isinstance(samples, Sequence) else itertools.islice(samples, kept, None)
    depth = len(anatomy.layers)
    more = f"and {depth * (depth + 1) // 2:,} layer calls on its text" if _knocks_out(anatomy, settings) else ""
    say_cost("saturation", how_many(rest, settings.max_samples), "a forward pass each", more, shown=progress)
    try:
        for sample in files.track(rest, "saturation", progress):
            if settings.max_samples is not None and done.samples >= settings.max_samples:
                break
            why_not = unusable(anatomy, sample)
            done = done.plus(measure_sample(anatomy, sample, settings)) if why_not is None else done.without(why_not)
            if state is not None and done.seen - kept >= settings.save_every:
                state.save(done)
                kept = done.seen
    except KeyboardInterrupt:
        if state is not None and done.seen > kept:
            state.save(done)
        raise
    if not done.samples:
        counts = ", ".join(f"{count} with {why}" for why, count in done.skipped.items())
        raise InputError(f"no usable sample for saturation: {counts}")
    return SaturationResult(done.mean(), done.samples, done.skipped, settings, patch)
