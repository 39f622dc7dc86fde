"""The host `llava`: the original package's LlavaLlamaForCausalLM and kin."""

import copy
from dataclasses import dataclass
from typing import Any

from llava_patch.core import stored
from llava_patch.core.errors import HostError
from llava_patch.core.records import CONFIG_KEY
from llava_patch.hosts import known
from llava_patch.hosts.host import Anatomy, HostFiles, made_of

LLAVA = "llava"
UNKNOWN = ("llava_mpt", "llava_gemma", "llava_mixtral", "llava_qwen_moe")
"""Model types of the package whose decoders are not known."""
_OWN_PREFIXES = ("mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_", "image_", "tokenizer_")


@dataclass(frozen=True, eq=False)
class LlavaAnatomy(Anatomy):
    """A model of the llava package."""

    host = LLAVA
    projector_name = "mm_projector"
    encoder_name = "encode_images"
    pixels_argument = "images"
    ids_hold_places = False
    tower_apart = True

    @classmethod
    def of(cls, model: Any) -> "LlavaAnatomy | None":
        """See `Anatomy.of`."""
        if not (hasattr(model, "get_vision_tower") and hasattr(model, "prepare_inputs_labels_for_multimodal")):
            return None
        decoder, tower = known.bare(model.get_model()), model.get_vision_tower()
        if tower is None or getattr(decoder, cls.projector_name, None) is None:
            raise HostError(
                "this llava model has no vision tower or projector yet: patch it after "
                "initialize_vision_modules(), or load a finished LLaVA checkpoint"
            )
        known.check_host(
            model, ((model, "forward"), (model, "prepare_inputs_labels_for_multimodal"), (model, cls.encoder_name))
        )
        return cls(model, decoder, model, known.bare(tower), decoder)

    vision_model = property(lambda self: known.bare(getattr(self.tower, "vision_tower", None)))
    vision_model_now = property(lambda self: getattr(self.model.get_vision_tower(), "vision_tower", None))
    patches_only = property(lambda self: getattr(self.tower, "select_feature", "") == "patch")
    dropped_tokens = property(lambda self: self.prefix_tokens if self.patches_only else 0)  # those before the patches

    _merge = property(lambda self: str(getattr(self.model.config, "mm_patch_merge_type", "flat")))
    tiles = property(lambda self: self._merge.startswith("spatial"))  # "spatial", "spatial_unpad", ...

    @property
    def selected_layer(self) -> Any:
        """`mm_vision_select_layer`; the last one on LLaVA-NeXT's SigLIP, and a name where several are joined."""
        several = str(getattr(self.tower, "select_feature", ""))
        return several if several.startswith("slice") else getattr(self.tower, "select_layer", -1)

    @property
    def vision_config(self) -> Any:
        """Of the vision model; LLaVA-NeXT's SigLIP deletes its last block, and keeps its configuration as it was."""
        config = self.tower.config
        if hasattr(self.tower, "select_layer"):
            return config
        if not known.name_of(self.tower, by_class=True).endswith(known.NEXT_SIGLIP):
            raise HostError(
                f"{type(self.tower).__name__} is not a vision tower that llava_patch knows on the llava package: it "
                "has no select_layer, and is not SigLipVisionTower. Routing leaves the tower alone and is available"
            )
        config = copy.deepcopy(config)
        config.num_hidden_layers -= 1
        return config

    @property
    def image_token_id(self) -> int:
        """A placeholder of -200, which no vocabulary has."""
        from llava.constants import IMAGE_TOKEN_INDEX

        return IMAGE_TOKEN_INDEX


def is_own(key: str) -> bool:
    """Whether a key of llava's config is LLaVA's rather than the language model's."""
    return key.startswith(_OWN_PREFIXES)


def text_config(config: dict[str, Any]) -> Any:
    """The language model's configuration: what is left of a config.json without LLaVA's own keys."""
    from transformers import AutoConfig

    dropped = ("model_type", "architectures", "_name_or_path", "auto_map", CONFIG_KEY)
    values = {k: v for k, v in copy.deepcopy(config).items() if not is_own(k) and k not in dropped}
    with made_of("config.json"):
        return AutoConfig.for_model(_family(config), **values)


_FAMILIES = {"llava_mistral": "mistral", "llava_qwen": "qwen2"}


def _family(config: dict[str, Any]) -> str:
    return _FAMILIES.get(str(config.get("model_type")), "llama")


def _skeleton(config: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig

    from llava_patch.hosts.towers import models as tower_models

    try:
        if (family := _family(config)) == "mistral":
            from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM as Model
        elif family == "qwen2":
            from llava.model.language_model.llava_qwen import LlavaQwenForCausalLM as Model
        else:
            from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM as Model
    except ImportError as error:
        raise HostError(f"the llava package, whose checkpoint this is, cannot be imported ({error})") from error
    values = {k: v for k, v in copy.deepcopy(config).items() if k not in ("model_type", "architectures")}
    # Or the constructor would load the tower's weights.
    values |= {"unfreeze_mm_vision_tower": False, "delay_load": True, "mm_tunable_parts": ""}
    try:
        model = Model(Model.config_class(**values))
    except (ImportError, OSError, ValueError) as error:  # S2 asks for a package of its own
        raise HostError(f"its vision tower {config.get('mm_vision_tower')} is not there ({error})") from error
    tower = model.get_vision_tower()
    if not hasattr(tower, "select_layer"):
        raise HostError(
            f"the vision tower {type(tower).__name__} of the llava package is not known without its weights"
        )
    name = tower.vision_tower_name
    vision = tower_models.read_config(name) or CLIPVisionConfig.from_pretrained(name)
    tower.vision_tower = tower_models.model_class(vision)(vision)
    tower.vision_tower.requires_grad_(False)  # as llava's own load_model does
    tower.is_loaded = True
    return model


LLAVA_FILES = HostFiles(  # of the vision tower, which has a folder of its own, a trained one alone is among them
    wrote=lambda config: "mm_vision_tower" in config and config.get("model_type") not in UNKNOWN,
    text_config=text_config,
    feature_width=lambda config: stored.field(config, "mm_hidden_size", int, "config.json"),
    skeleton=_skeleton,
    linear=lambda k: str(2 * k),  # activations have the odd places
    parts={
        "decoder": ("model.", r"model\.((?:embed_tokens|layers|norm|side_branch)\..+)"),
        "head": ("lm_head.", r"lm_head\.(weight)"),
        "tower": (
            "model.vision_tower.vision_tower.vision_model.",
            r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)",
        ),
        "projector": ("model.mm_projector.", r"model\.mm_projector\.(.+)"),
        "stack": ("model.mm_projector_stack.", r"model\.mm_projector_stack\.(.+)"),
        "image_newline": ("model.image_newline", r"model\.image_newline()"),
    },
)
