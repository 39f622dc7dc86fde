"""R-Probe on the reader, and damage to what it looks at: hooks before the projector, for the time of a block."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from llava_patch.hosts import anatomy
from llava_patch.measurements.rprobe.bootstrap import paired
from llava_patch.measurements.rprobe.fit import run_rprobe
from llava_patch.measurements.rprobe.settings import RProbe
from llava_patch.probe.sample import Sample
from llava_patch.tools.evidence.findings import Effect
from llava_patch.tools.evidence.small import digits, pages

RESAMPLES = 2000
DIGITS = 4  # significant ones of a sample's error


def probe(model: nn.Module, samples: Sequence[Sample], steps: int, seed: int, **settings: Any) -> dict[str, Any]:
    """Run R-Probe on a fifth of the samples, after training on the others, as plain JSON values.

    "errors" and "tokens" are those of the held-out samples, with spaces between, in an order that the samples and
    `seed` decide alone: two results can be compared sample by sample.
    """
    chosen = RProbe(steps=steps, seed=seed, store=False, maps=0, examples=0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a damaged model's probe learns nothing; that is what is measured
        found = run_rprobe(model, pages.image_processor(), pages.tokenizer(), chosen, samples, progress=False)
    ordered = sorted(found.documents, key=lambda sample: str(sample["id"]))
    return {
        "mse": found.mse,
        "fvu": found.fvu,
        "constant_mse": found.constant_mse,
        "tokens": " ".join(str(sample["tokens"]) for sample in ordered),
        "errors": " ".join(f"{sample['mse']:.{DIGITS}g}" for sample in ordered),
        "steps": steps,
        "steps_to_half_fvu": found.steps_to_half_fvu,
    }


def rises(more: Mapping[str, Any], less: Mapping[str, Any]) -> Effect:
    """By how much the error of one result is above another's on the same held-out samples."""
    value, low, high = paired(_documents(more), _documents(less), RESAMPLES, 0)
    assert low is not None and high is not None
    return Effect(value, low, high)


def _documents(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"id": number, "document": number, "tokens": int(tokens), "mse": float(error)}
        for number, (tokens, error) in enumerate(zip(result["tokens"].split(), result["errors"].split(), strict=True))
    ]


def averaged(states: Tensor) -> Tensor:
    """Each token averaged with its neighbours, 3 x 3 of the grid; [images, 16, channels] both."""
    grid = states.transpose(1, 2).unflatten(2, (digits.GRID, digits.GRID))
    smooth = functional.avg_pool2d(grid, 3, stride=1, padding=1, count_include_pad=False)
    return smooth.flatten(2).transpose(1, 2)


def dropped(share: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Sets a share of the tokens to 0; a larger share drops all that a smaller one does, and some more."""
    generator = torch.Generator().manual_seed(seed)

    def drop(states: Tensor) -> Tensor:
        kept = torch.rand(states.shape[:2], generator=generator) >= share
        return states * kept[..., None].to(states)

    return drop


def noisy(amount: float, seed: int) -> Callable[[Tensor], Tensor]:
    """Adds Gaussian noise of `amount` times the states' own spread."""
    generator = torch.Generator().manual_seed(seed)

    def add(states: Tensor) -> Tensor:
        noise = torch.randn(states.shape, generator=generator).to(states)
        return states + amount * states.detach().std() * noise

    return add


def taps_of_another_image(states: Tensor) -> Tensor:
    """The columns behind the main feature's come from the image before, in the batch."""
    main, taps = states[..., : states.shape[-1] // 4], states[..., states.shape[-1] // 4 :]
    return torch.cat([main, taps.roll(1, 0)], -1)


@contextlib.contextmanager
def damaged(model: nn.Module, damage: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Change what the projector is given, [images, 16, channels], for the time of the block."""
    if damage is None:
        yield
        return

    def change(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return damage(arguments[0]), *arguments[1:]

    hook = anatomy.find(model).projector.register_forward_pre_hook(change)
    try:
        yield
    finally:
        hook.remove()
