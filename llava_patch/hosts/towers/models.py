"""Vision models other than CLIP from a folder or the hub: configuration, weights, image processor; no torchvision.

Every model made here answers `vision(pixels, output_hidden_states=True)` with square pixels in and N + 1 hidden states
[images, tokens, channels] out; for classes of transformers that do not, `tower_classes` has subclasses that do.
"""

import copy
import pkgutil
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import PILImageResampling

from llava_patch.core.errors import CheckpointError, HostError
from llava_patch.hosts import compat
from llava_patch.hosts.towers import layout as towers

CLIP = ("clip", "clip_vision_model")
_CLASSES = {
    "clip_vision_model": "transformers:CLIPVisionModel",
    towers.TIMM: "llava_patch.hosts.towers.timm:TimmTower",
    "siglip2_vision_model": "llava_patch.hosts.towers.classes:SquareSiglip2",
    "internvl_vision": "llava_patch.hosts.towers.classes:InternViT",
    "aimv2_vision_model": "transformers:Aimv2VisionModel",
}


def read_config(name: str) -> Any:
    """The configuration of a vision tower, a folder or a hub name; None for a CLIP one and for one that is not there.

    Both are `llava`'s own business: it loads the one and has an error for the other. HostError: a tower that
    llava_patch does not know; `llava` would put random weights in its place.
    """
    try:
        raw, _ = PretrainedConfig.get_config_dict(name)
    except OSError:
        return None
    timm = "model_type" not in raw and "pretrained_cfg" in raw
    if not raw or raw.get("model_type") in CLIP or ("model_type" not in raw and not timm):
        return None
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
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
    """The vision model of a folder or name with its weights; a checkpoint of a larger model gives its vision part.

    CheckpointError: the checkpoint lacks weights of the tower, which transformers would make up.
    """
    names = {r"^(?:model\.)?vision_tower\.": ""}  # of InternVL's, Perception LM's and LLaVA's checkpoints
    if config.model_type == "aimv2_vision_model":
        names[r"^vision_model\."] = ""  # of a whole AIMv2
    model, info = model_class(config).from_pretrained(
        name, config=copy.deepcopy(config), device_map=device_map, key_mapping=names, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"vision tower {name}: its checkpoint holds no {missing[0]} ({len(missing)} tensors are missing): is it a "
            f"{config.model_type}?"
        )
    return model


def model_class(config: Any) -> Any:
    """The class that `load_model` makes of a configuration."""
    return pkgutil.resolve_name(_CLASSES.get(config.model_type, "transformers:SiglipVisionModel"))


class SquareSize(dict):
    """{"height", "width"} of a square image that also answers "shortest_edge", which llava's anyres code reads."""

    def __missing__(self, key: str) -> int:
        if key == "shortest_edge":
            return min(self["height"], self["width"])
        raise KeyError(key)


def _square(kind: Any) -> Any:
    """`SquareSize` as transformers' own class of sizes, whose fields would be nothing instead of missing."""

    class Square(kind):
        def __getitem__(self, key: str) -> int:
            return min(self.height, self.width) if key == "shortest_edge" else super().__getitem__(key)

    return Square


def load_processor(name: str, config: Any, side: int) -> Any:
    """The tower's image processor, with the fields that llava reads: image_mean, crop_size and size.

    A CLIP processor (AIMv2 has one) is taken as it is. The others (SigLIP, SigLIP 2 NaFlex, InternVL, Perception LM,
    timm) become one that stretches an image to the tower's square of `side` pixels, with the file's own colours and
    filter. HostError: no processor there, an unknown one, or one for another size.
    """
    try:
        raw, _ = BaseImageProcessor.get_image_processor_dict(name)
    except OSError as error:
        colours = getattr(config, "pretrained_cfg", None)
        if not colours or "mean" not in colours:
            raise HostError(f"vision tower {name} has no preprocessor_config.json") from error
        filters = {f.name.lower(): f for f in PILImageResampling}
        raw = {  # what timm's own configuration says of its images
            "image_processor_type": "TimmWrapperImageProcessor",
            "image_mean": list(colours["mean"]),
            "image_std": list(colours["std"]),
            "resample": int(filters.get(colours.get("interpolation"), PILImageResampling.BICUBIC)),
        }
    kind = raw.get("image_processor_type") or raw.get("feature_extractor_type") or "none named"
    if kind.startswith("CLIP"):
        clip = compat.pil_processor("CLIPImageProcessor").from_dict(raw)
        gives, takes = (clip.crop_size["height"], clip.crop_size["width"]), (side, side)
        if gives != takes:
            raise HostError(f"the image processor of {name} gives {gives} pixels, its vision tower takes {takes}")
        return clip
    if not kind.startswith(("Siglip", "GotOcr2", "PerceptionLM", "Timm")):
        raise HostError(
            f"the image processor of {name} is a {kind}: known are those of CLIP, Siglip, Siglip2, GotOcr2 (InternVL), "
            "PerceptionLM and timm"
        )
    fields = ("image_mean", "image_std", "resample", "do_rescale", "rescale_factor", "do_normalize")
    known = {n: raw[n] for n in fields if raw.get(n) is not None}
    siglip = compat.pil_processor("SiglipImageProcessor")
    processor = siglip(size=SquareSize(height=side, width=side), do_convert_rgb=True, **known)
    if not isinstance(processor.size, dict):  # transformers 5 makes a class of its own of it
        processor.size = _square(type(processor.size))(height=side, width=side)
    processor.crop_size = {"height": side, "width": side}
    processor.do_center_crop = False  # R-Probe asks every processor
    return processor
