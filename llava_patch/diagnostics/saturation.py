"""Visual saturation: from which layer on does the decoder no longer need its image tokens?

Source: "Late-Layer Fusion is Enough" (DPVR), section 2 and figure 2. Three curves over the layers, at image and text
positions apart: how much a layer turns the hidden states (cosine of its input and output), how much text attends to
the image, and how far each layer's logit-lens prediction is from the last one's. From them a split is recommended.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava_patch import files
from llava_patch.diagnostics import trace
from llava_patch.diagnostics.recommend import Recommendation, recommend, transition_layer
from llava_patch.errors import InputError, SettingError
from llava_patch.handle import get_handle
from llava_patch.hosts.anatomy import HF, Anatomy, find
from llava_patch.routing.program import Work


@dataclass(frozen=True)
class Saturation:
    """Settings of the saturation measurement; the defaults are this project's choice unless a source is named.

    Attributes:
        transition_share: the transition layer is where the logit-lens KL has fallen to this share of layer 0's.
        mass_tolerance: attention mass has settled when it stays within this share of its deep median.
        fall_share: the deep median must have fallen to this share of the highest mass, or mass has no say.
        max_samples: stop after so many usable samples; None: take all.
        chunk: attention queries, and positions of the logit lens, held at a time (memory against speed).
    """

    transition_share: float = 0.5
    mass_tolerance: float = 0.2
    fall_share: float = 0.5
    max_samples: int | None = None
    chunk: int = 128

    def __post_init__(self) -> None:
        for name in ("transition_share", "mass_tolerance", "fall_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
                raise SettingError(f"Saturation.{name} = {value!r}: expected a number between 0 and 1, both excluded")
        for name in ("max_samples", "chunk"):
            value = getattr(self, name)
            if name == "max_samples" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingError(f"Saturation.{name} = {value!r}: expected an integer >= 1")


@dataclass(frozen=True)
class Curves:
    """Per-layer values of one sample, or the mean over samples; index = layer number.

    Attributes:
        image_cosine: cosine between a layer's input and output, mean over image positions; NaN where absent.
        text_cosine: the same over text positions (everything that is not image).
        head_mass: [layers][heads], attention probability that text behind the image puts on image keys.
        image_kl: KL(final || layer) of the logit lens in nats, mean over image positions; NaN where absent.
        text_kl: the same over text positions.
    """

    image_cosine: list[float]
    text_cosine: list[float]
    head_mass: list[list[float]]
    image_kl: list[float]
    text_kl: list[float]

    @property
    def mass(self) -> list[float]:
        """Attention mass per layer, mean over heads."""
        return [sum(heads) / len(heads) for heads in self.head_mass]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Curves":
        """Read curves from JSON values, where null is NaN; KeyError, TypeError or ValueError when they are damaged."""
        curves = cls(**{f.name: _with_nan(values[f.name]) for f in fields(cls)})
        lengths = {len(curve) for curve in vars(curves).values()}
        if len(lengths) != 1 or 0 in lengths or not all(curves.head_mass):
            raise ValueError(f"curves over {sorted(lengths)} layers")
        return curves

    @property
    def image_present(self) -> list[bool]:
        """Whether each layer sees image positions."""
        return [not math.isnan(value) for value in self.image_cosine]


@dataclass(frozen=True)
class SaturationResult:
    """What was measured and what follows from it.

    Attributes:
        curves: mean over samples, each of which counts the same.
        recommendation: the split and why.
        image_transition: layer number or None, see `recommend.transition_layer`.
        text_transition: the same at text positions.
        samples: number of samples measured.
        skipped: number of samples left out, by reason.
        settings: the settings used.
    """

    curves: Curves
    recommendation: Recommendation
    image_transition: int | None
    text_transition: int | None
    samples: int
    skipped: dict[str, int]
    settings: Saturation = field(default_factory=Saturation)

    @property
    def n_layers(self) -> int:
        """Number L of decoder layers."""
        return len(self.curves.image_cosine)

    @property
    def recommended_split(self) -> int | None:
        """First layer of the window, or None (see `recommendation.reason`)."""
        return self.recommendation.split

    def depth_percent(self, layer: int | None) -> float | None:
        """A layer number as percent of the decoder's depth."""
        return None if layer is None else 100.0 * layer / self.n_layers

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes null."""
        window = self.recommendation.window
        return {
            "n_layers": self.n_layers,
            "samples": self.samples,
            "skipped": self.skipped,
            "recommended_split": self.recommended_split,
            "recommended_split_percent": self.depth_percent(self.recommended_split),
            "window": None if window is None else list(window),
            "reason": self.recommendation.reason,
            "image_transition_layer": self.image_transition,
            "image_transition_percent": self.depth_percent(self.image_transition),
            "text_transition_layer": self.text_transition,
            "text_transition_percent": self.depth_percent(self.text_transition),
            "attention_mass": files.plain(self.curves.mass),
            **files.plain(asdict(self.curves)),
            "settings": asdict(self.settings),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SaturationResult":
        """Read what `to_dict` made; what follows from the curves is worked out again."""
        curves, settings = Curves.from_dict(values), Saturation(**values["settings"])
        return summarise(curves, values["samples"], values["skipped"], settings)

    def save(self, folder: str | Path, name: str = "saturation") -> tuple[Path, Path]:
        """Write `<name>.json` and `<name>.png` into a folder, each atomically.

        Returns:
            The two paths.
        """
        from llava_patch.diagnostics.figures import saturation_figure

        folder = Path(folder)
        json_path = files.write_json(folder / f"{name}.json", self.to_dict())
        return json_path, saturation_figure(self, folder / f"{name}.png")


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(item) for item in value]
    return math.nan if value is None else float(value)


class CurveMean:
    """Running mean of curves: memory does not grow with samples. NaN (absent positions) does not count."""

    def __init__(self) -> None:
        self.samples = 0
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}

    def add(self, curves: Curves) -> None:
        """Add one sample."""
        for name, values in asdict(curves).items():
            new = torch.tensor(values, dtype=torch.float64)
            known = ~new.isnan()
            self._sums[name] = self._sums.get(name, 0) + new.nan_to_num(0.0)
            self._counts[name] = self._counts.get(name, 0) + known.long()
        self.samples += 1

    def mean(self) -> Curves:
        """Mean of what was added; 0 / 0 is NaN, which stands for absent."""
        return Curves(**{name: (self._sums[name] / self._counts[name]).tolist() for name in self._sums})


def summarise(
    curves: Curves, samples: int, skipped: dict[str, int] | None = None, settings: Saturation = Saturation()
) -> SaturationResult:
    """Transition layers and the recommended split of some curves."""
    return SaturationResult(
        curves=curves,
        recommendation=recommend(
            curves.mass,
            curves.image_kl,
            curves.image_cosine,
            curves.image_present,
            transition_share=settings.transition_share,
            mass_tolerance=settings.mass_tolerance,
            fall_share=settings.fall_share,
        ),
        image_transition=transition_layer(curves.image_kl, settings.transition_share),
        text_transition=transition_layer(curves.text_kl, settings.transition_share),
        samples=samples,
        skipped=dict(skipped or {}),
        settings=settings,
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's own training flag comes back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def unusable(anatomy: Anatomy, sample: dict[str, Any]) -> str | None:
    """Why a sample cannot be measured; None when it can."""
    pixels = sample.get("pixel_values") if anatomy.host == HF else sample.get("images")
    places = sample["input_ids"][0] == anatomy.image_token_id
    if pixels is None or not bool(places.any()):
        return "no image"
    return None if len(trace.text_after_image(places)) else "no text after the image"


def _check_program(anatomy: Anatomy) -> None:
    handle = get_handle(anatomy.model)
    program = None if handle is None else handle.program()
    if program is not None and (program.prune_at is not None or Work.KEYS in program.work):
        raise InputError(
            "saturation cannot be measured on a model that prunes image tokens or runs the KV variant, whose layers "
            "see a part of them: measure the stock model, or another variant"
        )


def measure_sample(anatomy: Anatomy, sample: dict[str, Any], settings: Saturation = Saturation()) -> Curves:
    """Measure one usable sample: one forward pass of the model.

    Args:
        anatomy: the host model, from `hosts.anatomy.find`.
        sample: keyword arguments of the model's forward, batch of one, no padding.
        settings: see `Saturation`.
    """
    _check_program(anatomy)
    with evaluating(anatomy.model):
        with trace.traced(anatomy, settings.chunk) as seen:
            trace.run(anatomy, seen, sample)
        image_kl, text_kl = trace.lens_kl(anatomy, seen, settings.chunk)
    layers = range(len(anatomy.layers))
    return Curves(
        image_cosine=[seen.image_cosine[i] for i in layers],
        text_cosine=[seen.text_cosine[i] for i in layers],
        head_mass=[seen.mass[i].tolist() for i in layers],
        image_kl=image_kl,
        text_kl=text_kl,
    )


def measure_saturation(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    settings: Saturation = Saturation(),
    progress: bool = True,
) -> SaturationResult:
    """Measure visual saturation of a stock or routed model.

    Args:
        model: a model of either host, possibly wrapped (DDP, peft).
        samples: keyword arguments of the model's forward, each a batch of one without padding, on the model's device.
            `llava`: input_ids with the placeholder of -200, images; HF: input_ids, pixel_values, attention_mask.
        settings: see `Saturation`.
        progress: show a progress bar on stderr.

    Returns:
        The mean over samples. In layers that a routed model runs on text only, attention mass is 0 by definition and
        image values are NaN.

    Raises:
        InputError: no usable sample, a batch, padding.
    """
    anatomy = find(model)
    mean, skipped = CurveMean(), {"no image": 0, "no text after the image": 0}
    for sample in files.track(samples, "saturation", progress):
        if settings.max_samples is not None and mean.samples >= settings.max_samples:
            break
        why_not = unusable(anatomy, sample)
        if why_not is not None:
            skipped[why_not] += 1
            continue
        mean.add(measure_sample(anatomy, sample, settings))
    if not mean.samples:
        counts = ", ".join(f"{count} with {why}" for why, count in skipped.items())
        raise InputError(f"no usable sample for saturation: {counts}")
    return summarise(mean.mean(), mean.samples, skipped, settings)
