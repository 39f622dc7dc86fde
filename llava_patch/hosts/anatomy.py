"""Where things are in a host model: decoder layers, norm, head, vision tower, projector, image tokens.

This is the only file that knows attribute names of the hosts. Two hosts are known: the original `llava` package
(`LlavaLlamaForCausalLM` and kin) and Hugging Face's `LlavaForConditionalGeneration`. They are recognised by the
attributes they have, so neither package needs to be installed for the other to work; which of the models that have them
are taken is in `known`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llava_patch.core.errors import HostError
from llava_patch.hosts import known
from llava_patch.hosts.towers import layout as towers
from llava_patch.hosts.towers.layout import Shape, Tower

LLAVA = "llava"
HF = "hf"


def unwrap(model: Any) -> Any:
    """Strip DDP, DeepSpeed engines, torch.compile and peft wrappers around a host model."""
    while True:
        model = known.bare(model)
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine", "DataParallel"):
            model = model.module
        else:
            return model


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one host model.

    Attributes:
        host: "llava" or "hf".
        model: the causal LM itself (wrappers stripped).
        decoder: the LlamaModel (embed_tokens, layers, norm, rotary_emb).
        wrapper: the module whose forward turns token ids and images into the decoder's embeddings: the causal LM on
            `llava`, the inner LlavaModel on HF.
        tower: the vision tower as the host holds it (CLIPVisionTower on `llava`, CLIPVisionModel on HF).
        projector_owner: the module that holds the projector.
        projector_name: the projector's attribute name there.
    """

    host: str
    # Typed Any: what these modules have is the host's business, and this file is where it is known.
    model: Any
    decoder: Any
    wrapper: Any
    tower: Any
    projector_owner: Any
    projector_name: str

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, 0..L-1.

        Raises:
            HostError: a decoder that keeps them elsewhere.
        """
        layers = getattr(self.decoder, "layers", None)
        if layers is None:
            raise HostError(
                f"{type(self.decoder).__name__} is not a decoder that llava_patch knows: it has no `layers`. Proven "
                f"decoders: {', '.join(known.DECODERS)}"
            )
        return layers

    @property
    def norm(self) -> nn.Module:
        """The decoder's final norm."""
        return self.decoder.norm

    @property
    def lm_head(self) -> nn.Module:
        """The output head: hidden size to vocabulary."""
        return self.model.lm_head

    @property
    def embed_tokens(self) -> Any:
        """The token embedding."""
        return self.decoder.embed_tokens

    @property
    def text_config(self) -> Any:
        """Configuration of the decoder (hidden_size, num_attention_heads, ...)."""
        return self.decoder.config

    @property
    def projector(self) -> nn.Module:
        """The projector: vision channels to decoder hidden size."""
        return getattr(self.projector_owner, self.projector_name)

    @property
    def stack_name(self) -> str:
        """Name of DeepStack's projector beside the projector; LLaVA's scripts treat what starts like it alike."""
        return f"{self.projector_name}_stack"

    @property
    def vision_model(self) -> Any:
        """The transformers vision model inside the tower; None while `llava` has not loaded it yet."""
        if self.host == HF:
            return self.tower
        return getattr(self.tower, "vision_tower", None)

    @property
    def vision_model_now(self) -> Any:
        """`vision_model`, or what somebody has put in its place since the model was described."""
        if self.host == HF:
            return self.wrapper.vision_tower
        return getattr(self.model.get_vision_tower(), "vision_tower", None)

    @property
    def vision_config(self) -> Any:
        """Configuration of the vision model; known before its weights are loaded."""
        return self.tower.config

    @property
    def _shape(self) -> Shape:
        return towers.shape_of(self.vision_config)

    @property
    def vision_width(self) -> int:
        """Channels of one token of the vision tower."""
        return self._shape.width

    @property
    def tiles(self) -> bool:
        """Whether images are cut into tiles whose patches the host itself counts (anyres with a spatial layout)."""
        if self.host == HF:
            return hasattr(self.wrapper, "pack_image_features")
        return str(getattr(self.model.config, "mm_patch_merge_type", "flat")).startswith("spatial")

    @property
    def mixes_patches(self) -> bool:
        """Whether the host makes tokens of several patches on their way (LLaVA-NeXT's pooling and anyres_max)."""
        config = self.model.config
        ratio, merge = (str(getattr(config, n, "")) for n in ("image_aspect_ratio", "mm_patch_merge_type"))
        return self.host == LLAVA and ("anyres_max" in ratio or "maxpool" in merge)

    @property
    def n_blocks(self) -> int:
        """Number N of transformer blocks in the vision tower."""
        return self._shape.n_blocks

    @property
    def main_block(self) -> int:
        """The block whose output is the main feature, 1..N (LLaVA-1.5 selects -2: block N-1).

        Raises:
            HostError: the host itself selects several layers, or one that the tower does not have.
        """
        select = self.tower.select_layer if self.host == LLAVA else self.model.config.vision_feature_layer
        if not isinstance(select, int):
            raise HostError(
                f"the model's own vision_feature_layer = {select} already fuses several layers; llava_patch needs one "
                "main layer (an integer)"
            )
        block = select if select >= 0 else self.n_blocks + 1 + select
        if not 1 <= block <= self.n_blocks:
            raise HostError(f"vision select layer {select} is outside the tower's {self.n_blocks} blocks")
        return block

    @property
    def _drops_first(self) -> bool:
        """Whether the host asks for patches alone."""
        if self.host == LLAVA:
            return self.tower.select_feature == "patch"
        return self.model.config.vision_feature_select_strategy == "default"

    @property
    def prefix_tokens(self) -> int:
        """Tokens that the tower puts before the patches (CLS, registers), dropped or not."""
        return towers.prefix_tokens_of(self.vision_config)

    @property
    def drops_cls(self) -> bool:
        """Whether the host drops what comes before the patches (the CLS token) before the projector."""
        return self._drops_first and towers.prefix_tokens_of(self.vision_config) > 0

    @property
    def drops_patch(self) -> bool:
        """Whether the host drops the first patch: HF's "default" strategy on a tower without CLS.

        It is the host's own behaviour, whatever the tower; "full" keeps all patches.
        """
        return self.host == HF and self._drops_first and towers.prefix_tokens_of(self.vision_config) == 0

    @property
    def dropped_tokens(self) -> int:
        """How many tokens of the tower the host drops at the front before the projector."""
        if self.host == HF:
            return int(self._drops_first)
        return towers.prefix_tokens_of(self.vision_config) if self._drops_first else 0

    @property
    def patch_size(self) -> int:
        """Side of one ViT patch in pixels of the processed image."""
        return self._shape.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patch grid of one image (tile)."""
        return self._shape.grid

    @property
    def image_token_id(self) -> int:
        """The id that marks an image in `input_ids` (a placeholder of -200 on `llava`)."""
        if self.host == LLAVA:
            from llava.constants import IMAGE_TOKEN_INDEX

            return IMAGE_TOKEN_INDEX
        return int(self.model.config.image_token_id)

    def vision_parts(self) -> Tower:
        """Where the blocks of the loaded vision tower are, and what its tokens mean.

        Raises:
            HostError: the tower is not loaded yet, its class is not known (the message names what was not found), or
                it does not report its hidden states to this host.
        """
        if self.vision_model is None:
            raise HostError("the vision tower is not loaded yet: call its load_model() first")
        towers.check_reports(self.vision_model)
        return towers.describe(self.vision_model)

    def first_linear(self) -> tuple[nn.Module, str, nn.Linear]:
        """The projector's first Linear as (parent module, attribute name, module).

        Raises:
            HostError: the projector has no Linear (mm_projector_type = identity).
        """
        if isinstance(self.projector, nn.Linear):
            return self.projector_owner, self.projector_name, self.projector
        for name, child in self.projector.named_children():
            if isinstance(child, nn.Linear):
                return self.projector, name, child
        hint = ""
        if any("lora_" in name for name, _ in self.projector.named_parameters()):
            hint = ": peft has wrapped it; patch the model first, or leave the projector out of LoRA's target_modules"
        raise HostError(f"the projector {type(self.projector).__name__} has no Linear layer to widen{hint}")

    @property
    def encoder(self) -> tuple[Any, str]:
        """(owner, name) of the method that turns pixel values into projected visual tokens in the host's own path."""
        return (self.model, "encode_images") if self.host == LLAVA else (self.wrapper, "get_image_features")

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Projected visual tokens, through the host's own path (so a patched model gives its fused features).

        On a model that cuts images into tiles: of single tiles, neither joined nor cut.

        Args:
            pixel_values: [images, 3, height, width], normalised by the host's image processor.

        Returns:
            [images, tokens, hidden_size].
        """
        if self.host == LLAVA:
            return self.model.encode_images(pixel_values)
        if hasattr(self.wrapper, "pack_image_features"):  # LLaVA-NeXT's own method wants all tiles of whole images
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states
            return self.projector(states[self.main_block][:, self.dropped_tokens :])
        features = self.wrapper.get_image_features(pixel_values=pixel_values)
        features = getattr(features, "pooler_output", features)  # a model output from transformers 5 on
        return features if isinstance(features, Tensor) else torch.stack(list(features))


def find(model: Any) -> Anatomy:
    """Describe a host model.

    Args:
        model: `LlavaLlamaForCausalLM` (original package) or `LlavaForConditionalGeneration`, possibly inside DDP,
            DeepSpeed, torch.compile or peft.

    Raises:
        HostError: another kind of model, one that overrides what turns images into embeddings (see `known`), or one
            that has no vision tower yet.
    """
    model = unwrap(model)
    if hasattr(model, "get_vision_tower") and hasattr(model, "prepare_inputs_labels_for_multimodal"):
        decoder = model.get_model()
        tower = model.get_vision_tower()
        if tower is None or getattr(decoder, "mm_projector", None) is None:
            raise HostError(
                "this llava model has no vision tower or projector yet: patch it after "
                "initialize_vision_modules(), or load a finished LLaVA checkpoint"
            )
        known.check_host(
            model, ((model, "forward"), (model, "prepare_inputs_labels_for_multimodal"), (model, "encode_images"))
        )
        return Anatomy(LLAVA, model, decoder, model, tower, decoder, "mm_projector")
    inner: Any = getattr(model, "model", None)
    if hasattr(inner, "multi_modal_projector") and hasattr(inner, "language_model"):
        known.check_host(model, ((model, "forward"), (inner, "forward"), (inner, "get_image_features")))
        return Anatomy(HF, model, inner.language_model, inner, inner.vision_tower, inner, "multi_modal_projector")
    raise HostError(
        f"{type(model).__name__} is not a model that llava_patch knows: expected the llava package's "
        "LlavaLlamaForCausalLM or Hugging Face's LlavaForConditionalGeneration"
    )
