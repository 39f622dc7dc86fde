"""Attention maps of a model's vision tower: which patches does a shallow block look at?

Source: "Detached Skip-Links and R-Probe", figure 2 and appendix A.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core import files
from llava_patch.core.errors import HostError, InputError, SettingError
from llava_patch.core.finite import why_not_finite
from llava_patch.hosts.anatomy import Anatomy, find
from llava_patch.hosts.towers import attention as tower_attention
from llava_patch.measurements.attention_maps import maths
from llava_patch.measurements.attention_maps import measurement as maps
from llava_patch.measurements.passes import evaluating

ROWS = 12
"""Images that the figure shows at most; the others are in JSON only."""


def measure_attention_maps(
    model: nn.Module,
    samples: Iterable[dict[str, Any]],
    settings: maps.AttentionMaps = maps.DEFAULTS,
    progress: bool = True,
    image_processor: Any = None,
    checkpoint: str = "model",
    images: Iterable[str] = (),
    source: str = "",
) -> maps.AttentionMapsResult:
    """Measure one checkpoint; `AttentionMapsResult.beside` puts several together.

    Only the vision tower runs, up to its end; the decoder does not.

    Args:
        model: a model of either host, stock or patched, possibly wrapped.
        samples: keyword arguments of the model's forward, each with one image; only the pixels are read. Of an image
            in tiles (anyres) the overview tile is taken, which shows the whole image: a softmax over one tile cannot be
            compared with another tile's.
        settings: see `AttentionMaps`.
        progress: show a progress bar on stderr.
        image_processor: the model's, whose normalisation is undone in the figure.
        checkpoint: what to call the model.
        images: names of the images; default: their numbers.
        source: where the checkpoint is, for the record.

    Raises:
        SettingError: the tower has no such block.
        InputError: no sample with an image, or one with several.
        HostError: a tower that is not known or whose tokens do not make its grid, or numbers that are not finite.
    """
    anatomy = find(model)
    tower = anatomy.vision_parts()
    if settings.block > len(tower.blocks):
        raise SettingError(
            f"AttentionMaps.block = {settings.block}: the vision tower of {checkpoint} has blocks "
            f"1..{len(tower.blocks)}"
        )
    anatomy.check_one_scale("attention_maps")
    names, labels, part = iter(images), [], maps.WHOLE
    found: list[list[list[float]]] = []
    views: list[maps.View] = []
    with evaluating(model):
        for sample in files.track(samples, f"attention maps of {checkpoint}", progress):
            if settings.max_samples is not None and len(found) >= settings.max_samples:
                break
            pixels, part = pixels_of(anatomy, sample)
            found.append(_map_of(anatomy, pixels, settings).tolist())
            labels.append(next(names, f"image {len(found)}"))
            if len(views) < ROWS:
                views.append(view(anatomy, pixels[0], image_processor))
    if not found:
        raise InputError("no image to draw attention maps of")
    query = maps.CLS if tower_attention.has_cls(anatomy.vision_model, tower) else maps.MEAN
    one = maps.CheckpointMaps(checkpoint, query, part, settings.block, len(tower.blocks), found, source, views)
    return maps.AttentionMapsResult(labels, [one], settings)


def pixels_of(anatomy: Anatomy, sample: dict[str, Any]) -> tuple[Tensor, str]:
    """The pixels that the tower sees, [1, 3, height, width], and what of the image they are: `WHOLE` or `OVERVIEW`."""
    pixels = anatomy.pixels_of(sample)
    if pixels is None or len(pixels) != 1:
        count = 0 if pixels is None else len(pixels)
        raise InputError(f"attention maps take samples of one image each, got {count}")
    tiles = pixels[0]
    return (tiles[:1], maps.OVERVIEW) if tiles.ndim == 4 else (tiles[None], maps.WHOLE)


@torch.no_grad()
def _map_of(anatomy: Anatomy, pixels: Tensor, settings: maps.AttentionMaps) -> Tensor:
    """The attention map of one image's normalised pixels [1, 3, height, width], mean over heads.

    Returns:
        float32 [rows, columns] on CPU: attention probabilities.
    """
    vision, tower = anatomy.vision_model, anatomy.vision_parts()
    weight = next(vision.parameters())
    with tower_attention.watched(tower, settings.block) as seen:
        vision(pixels.to(weight.device, weight.dtype))
    if seen.q is None or seen.k is None:
        raise HostError(f"the attention of block {settings.block} did not run in {type(vision).__name__}'s forward")
    cls = tower_attention.has_cls(vision, tower)
    scores = maths.patch_attention(seen.q[0], seen.k[0], seen.scaling, tower.prefix_tokens, cls, settings.chunk)
    rows, columns = tower.grid
    if scores.numel() != rows * columns:
        raise HostError(
            f"the vision tower gives {scores.numel()} patches for pixels of {tuple(pixels.shape[-2:])}, its "
            f"configuration says {rows} x {columns}: is this the model's image processor?"
        )
    if not bool(scores.isfinite().all()):
        what = f"attention scores of the vision tower's block {settings.block}"
        raise HostError(why_not_finite(what, weight.dtype, vision.named_parameters()))
    return scores.reshape(rows, columns).cpu()


def view(anatomy: Anatomy, pixels: Tensor, processor: Any) -> maps.View:
    """The image in 8 bits, cut to what the patches cover; without a processor's numbers stretched to its range."""
    image = pixels.float().cpu()
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if processor is None or mean is None or std is None:
        image = maths.min_max(image)
    elif getattr(processor, "do_normalize", True):
        image = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    rows, columns = (anatomy.patch_size * patches for patches in anatomy.grid)
    image = (255 * image[:, :rows, :columns].clamp(0, 1)).round().to(torch.uint8)
    return maps.View(image.permute(1, 2, 0).numpy(), anatomy.patch_size)
