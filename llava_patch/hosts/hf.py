"""The host `hf`: Hugging Face's LLaVA, LLaVA-NeXT and LLaVA-OneVision (`...ForConditionalGeneration`)."""

import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor

from llava_patch.core.errors import HostError
from llava_patch.hosts import known
from llava_patch.hosts.host import Anatomy, HostFiles, made_of

HF = "hf"
VIDEOS = "pixel_values_videos"
"""The argument of the model's forward that brings videos, [videos, frames, 3, height, width]."""


@dataclass(frozen=True, eq=False)
class HFAnatomy(Anatomy):
    """A LLaVA of transformers."""

    host = HF
    projector_name = "multi_modal_projector"
    encoder_name = "get_image_features"
    pixels_argument = "pixel_values"
    video_encoder_name = "get_video_features"  # of a LLaVA-OneVision
    ids_hold_places = True
    tower_apart = False

    @classmethod
    def of(cls, model: Any) -> "HFAnatomy | None":
        """See `Anatomy.of`."""
        inner: Any = getattr(model, "model", None)
        if inner is None and hasattr(model, cls.projector_name) and hasattr(model, "language_model"):
            raise HostError(
                f"{type(model).__name__} of this transformers places images inside its own forward, so it cannot "
                "be patched: install transformers 4.52 or newer, or use the llava package's model"
            )
        if not (hasattr(inner, cls.projector_name) and hasattr(inner, "language_model")):
            return None
        inner = known.bare(inner)
        methods = [name for name in (cls.encoder_name, cls.video_encoder_name) if hasattr(inner, name)]
        known.check_host(model, ((model, "forward"), (inner, "forward"), *((inner, name) for name in methods)))
        return cls(model, known.bare(inner.language_model), inner, known.bare(inner.vision_tower), inner)

    vision_model = property(attrgetter("tower"))
    vision_model_now = property(attrgetter("wrapper.vision_tower"))
    selected_layer = property(attrgetter("model.config.vision_feature_layer"))
    patches_only = property(lambda self: self.model.config.vision_feature_select_strategy == "default")
    dropped_tokens = property(lambda self: int(self.patches_only))  # on a tower without CLS that is a patch
    tiles = property(lambda self: hasattr(self.wrapper, "pack_image_features"))  # a LLaVA-NeXT
    image_token_id = property(attrgetter("model.config.image_token_id"))

    @property
    def visual_tokens(self) -> dict[str, int]:
        """See `Anatomy.visual_tokens`."""
        videos = {VIDEOS: self.model.config.video_token_id} if self.takes_videos else {}
        return {**super().visual_tokens, **videos}

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """See `Anatomy.encode_images`."""
        if self.tiles:  # LLaVA-NeXT's own method wants all tiles of whole images
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states
            return self.projector(states[self.main_block][:, self.dropped_tokens :])
        return super().encode_images(pixel_values)


def whole_config(config: dict[str, Any]) -> Any:
    """Transformers' configuration object of a config.json; defaults that a short one leaves out are filled in."""
    from transformers import AutoConfig

    values = copy.deepcopy(config)
    with made_of("config.json"):
        return AutoConfig.for_model(values.pop("model_type"), **values)


def _skeleton(config: dict[str, Any]) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(whole_config(config))


HF_FILES = HostFiles(
    wrote=lambda config: (
        config.get("model_type") in ("llava", "llava_next", "llava_onevision") and "text_config" in config
    ),
    text_config=lambda config: whole_config(config).text_config,
    feature_width=lambda config: int(whole_config(config).vision_config.hidden_size),
    skeleton=_skeleton,
    linear=lambda k: f"linear_{k + 1}",
    parts={
        "decoder": ("language_model.model.", r"(?:language_model\.model|model\.language_model)\.(.+)"),
        "head": ("language_model.lm_head.", r"(?:language_model\.)?lm_head\.(weight)"),
        "tower": ("vision_tower.vision_model.", r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)"),
        "projector": ("multi_modal_projector.", r"(?:model\.)?multi_modal_projector\.(.+)"),
        "stack": ("multi_modal_projector_stack.", r"(?:model\.)?multi_modal_projector_stack\.(.+)"),
        "image_newline": ("image_newline", r"(?:model\.)?image_newline()"),
    },
)
