"""Vision models other than CLIP from a folder or the hub: configuration, weights, image processor; no torchvision.

Every model made here answers `vision(pixels, output_hidden_states=True)` with square pixels in and N + 1 hidden states
[images, tokens, channels] out; classes of transformers that do not are subclassed so that they do, in one forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    CLIPImageProcessor,
    InternVLVisionModel,
    PretrainedConfig,
    Siglip2VisionModel,
    SiglipImageProcessor,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel
from transformers.utils.generic import is_timm_config_dict

from llava_patch.errors import CheckpointError, HostError
from llava_patch.hosts import towers

CLIP = ("clip", "clip_vision_model")


def read_config(name: str) -> Any:
    """The configuration of a vision tower; None for a CLIP one and for one that is not there.

    Both are `llava`'s own business: it loads the one and has an error for the other.

    Args:
        name: a folder, or a name on the hub (read from the cache when offline).

    Raises:
        HostError: a tower that llava_patch does not know; `llava` would put random weights in its place.
    """
    try:
        raw, _ = PretrainedConfig.get_config_dict(name)
    except OSError:
        return None
    timm = "model_type" not in raw and is_timm_config_dict(raw)
    if not raw or raw.get("model_type") in CLIP or ("model_type" not in raw and not timm):
        return None
    try:
        config = AutoConfig.from_pretrained(name)
    except (ValueError, KeyError, ImportError) as error:
        raise HostError(f"vision tower {name}: its configuration cannot be read ({error})") from error
    config = getattr(config, "vision_config", config)
    if config.model_type in CLIP:
        return None
    if config.model_type not in (*towers.PREFIX_TOKENS, towers.TIMM):
        raise HostError(
            f"vision tower {name} is of type {config.model_type}, which is not known: known are "
            f"{', '.join([*towers.PREFIX_TOKENS, towers.TIMM])}"
        )
    return config


def load_model(name: str, config: Any, device_map: Any = None) -> Any:
    """The vision model with its weights.

    Args:
        name: the tower's folder or name; a checkpoint of a larger model gives its vision part.
        config: what `read_config` gave.
        device_map: as from_pretrained takes it.

    Raises:
        CheckpointError: the checkpoint lacks weights of the tower, which transformers would make up.
    """
    names = {r"^(?:model\.)?vision_tower\.": ""}  # of InternVL's, Perception LM's and LLaVA's checkpoints
    if config.model_type == "aimv2_vision_model":
        names[r"^vision_model\."] = ""  # of a whole AIMv2
    model, info = model_class(config).from_pretrained(
        name, config=copy.deepcopy(config), device_map=device_map, key_mapping=names, output_loading_info=True
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"vision tower {name}: its checkpoint holds no {missing[0]} ({len(missing)} tensors are missing): is it a "
            f"{config.model_type}?"
        )
    return model


def model_class(config: Any) -> Any:
    """The class that `load_model` makes of a configuration."""
    own = {"siglip2_vision_model": SquareSiglip2, "internvl_vision": InternViT, towers.TIMM: TimmTower}
    if config.model_type in own:
        return own[config.model_type]
    from transformers import AutoModel

    return AutoModel._model_mapping[type(config)]


class SquareSiglip2(Siglip2VisionModel):
    """SigLIP 2 NaFlex on a fixed square grid: takes pixels, as the other towers do, and cuts the patches itself."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """[images, 3, side, side], the side a multiple of the patch size, to the stock class's output."""
        size = self.config.patch_size
        patches = patchify(pixel_values, size)
        rows, columns = pixel_values.shape[-2] // size, pixel_values.shape[-1] // size
        mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
        shapes = torch.tensor([[rows, columns]]).expand(len(patches), 2)  # on the CPU: read as sizes, one by one
        return super().forward(patches, mask, shapes, **kwargs)


class InternViT(InternVLVisionModel):
    """InternVLVisionModel, which records no hidden states, with them."""

    last_state_is_normed = True

    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any) -> Any:
        """[images, 3, side, side] to the stock class's output, with hidden states when asked."""
        return with_states(self, lambda: super(InternViT, self).forward(pixel_values, **kwargs), output_hidden_states)


class TimmTower(TimmWrapperModel):
    """TimmWrapperModel, which reports feature maps without prefix tokens, with hidden states like the other towers'."""

    last_state_is_normed = True

    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None, **kwargs: Any) -> Any:
        """[images, 3, side, side] to the stock class's output, unpooled, with hidden states when asked."""
        stock = super().forward
        return with_states(
            self,
            lambda: stock(pixel_values, output_hidden_states=False, do_pooling=False, **kwargs),
            output_hidden_states,
        )


def with_states(vision: Any, forward: Callable[[], Any], wanted: bool | None) -> Any:
    """Run a forward and add what goes into each block, and comes out at the end, as its hidden states.

    Entry N is the model's last_hidden_state, after the final norm, as transformers' own recorder has it.

    Args:
        vision: the vision model.
        forward: its stock forward, without arguments.
        wanted: whether hidden states are asked for.
    """
    if not wanted:
        return forward()
    states: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    blocks = towers.describe(vision).blocks
    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        output = forward()
    finally:  # before a recomputation of checkpointed blocks, which would be heard again
        for hook in hooks:
            hook.remove()
    output["hidden_states"] = (*states, output.last_hidden_state)
    return output


def patchify(pixels: Tensor, size: int) -> Tensor:
    """Cut images as Siglip2ImageProcessor does: [images, channels, height, width] to [images, patches, values].

    Patches in rows; a patch's values in its rows, columns and channels, channels fastest.
    """
    images, channels, height, width = pixels.shape
    cut = pixels.reshape(images, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 3, 5, 1).reshape(images, (height // size) * (width // size), size * size * channels)


class SquareSize(dict):
    """{"height", "width"} of a square image that also answers "shortest_edge", which llava's anyres code reads."""

    def __missing__(self, key: str) -> int:
        if key == "shortest_edge":
            return min(self["height"], self["width"])
        raise KeyError(key)


def load_processor(name: str, config: Any, side: int) -> Any:
    """The tower's image processor, with the fields that llava reads: image_mean, crop_size and size.

    A CLIP processor (AIMv2 has one) is taken as it is. The others (SigLIP, SigLIP 2 NaFlex, InternVL, Perception LM,
    timm) become one that stretches an image to the tower's square, with the file's own colours and filter.

    Args:
        name: the tower's folder or name.
        config: what `read_config` gave.
        side: of the square image that the tower takes, in pixels.

    Raises:
        HostError: no processor there, an unknown one, or one for another size.
    """
    try:
        raw, _ = BaseImageProcessor.get_image_processor_dict(name)
    except OSError as error:
        colours = getattr(config, "pretrained_cfg", None)
        if not colours or "mean" not in colours:
            raise HostError(f"vision tower {name} has no preprocessor_config.json") from error
        raw = _timm_processor(colours)
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type") or "none named"
    if kind.startswith("CLIP"):
        processor = CLIPImageProcessor.from_dict(raw)
        gives = (processor.crop_size["height"], processor.crop_size["width"])
        if gives != (side, side):
            raise HostError(
                f"the image processor of {name} gives {gives} pixels, its vision tower takes {(side, side)}"
            )
        return processor
    if not kind.startswith(("Siglip", "GotOcr2", "PerceptionLM", "Timm")):
        raise HostError(
            f"the image processor of {name} is a {kind}: known are those of CLIP, Siglip, Siglip2, GotOcr2 (InternVL), "
            "PerceptionLM and timm"
        )
    fields = ("image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize")
    known = {n: raw[n] for n in fields if raw.get(n) is not None}
    processor: Any = SiglipImageProcessor(size=SquareSize(height=side, width=side), do_convert_rgb=True, **known)
    processor.crop_size = {"height": side, "width": side}
    return processor


def _timm_processor(pretrained: dict[str, Any]) -> dict[str, Any]:
    """What timm's own configuration says of its images."""
    filters = {f.name.lower(): int(f) for f in PILImageResampling}
    return {
        "image_processor_type": "TimmWrapperImageProcessor",
        "image_mean": list(pretrained["mean"]),
        "image_std": list(pretrained["std"]),
        "resample": filters.get(pretrained.get("interpolation", "bicubic"), int(PILImageResampling.BICUBIC)),
    }
