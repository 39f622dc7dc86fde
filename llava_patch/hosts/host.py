"""What a host is: the two classes that a file of this folder fills in for one more host (`llava.py`, `hf.py`).

`Anatomy` answers for a model in memory: where its parts are, and which tokens come out of them. `HostFiles` answers for
a checkpoint on disk: whose config.json it is, its parts' configurations, and the names of its tensors.
"""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

from torch import Tensor, nn

from llava_patch.core.errors import CheckpointError, HostError, LlavaPatchError, brief
from llava_patch.hosts import compat, known, lora
from llava_patch.hosts.towers import layout as towers
from llava_patch.hosts.towers.layout import Tower


def _asked() -> Any:
    """A property that every host's file must fill in."""
    return property(abstractmethod(lambda self: None))


@dataclass(frozen=True, eq=False)
class Anatomy(ABC):
    """The parts of one host model."""

    host: ClassVar[str]  # the host's name
    projector_name: ClassVar[str]  # the projector's attribute name in `projector_owner`
    encoder_name: ClassVar[str]  # `wrapper`'s method that turns pixel values into projected visual tokens
    pixels_argument: ClassVar[str]  # the argument of the model's forward that brings images
    video_encoder_name: ClassVar[str] = ""  # `wrapper`'s method that does so for videos, where the host has another
    # Whether `input_ids` have one placeholder for each image token, written by a processor that takes text and images
    # together; else one placeholder an image, and the model makes room while it runs.
    ids_hold_places: ClassVar[bool]
    # Whether the vision tower has files of its own, is loaded after the language model, and runs under `no_grad`; else
    # it is a part of the model like any other.
    tower_apart: ClassVar[bool]

    # Typed Any: what these modules have is the host's business.
    model: Any  # the causal LM itself (wrappers stripped)
    decoder: Any  # the LlamaModel (embed_tokens, layers, norm, rotary_emb)
    # The module whose forward turns token ids and images into the decoder's embeddings: the causal LM on `llava`, the
    # inner LlavaModel on HF.
    wrapper: Any
    tower: Any  # the vision tower as the host holds it (CLIPVisionTower on `llava`, CLIPVisionModel on HF)
    projector_owner: Any  # the module that holds the projector

    vision_model = _asked()  # the transformers vision model inside the tower; None while the host has not loaded it yet
    vision_model_now = _asked()  # `vision_model`, or what somebody has put in its place since the model was described
    selected_layer = _asked()  # the hidden state that the host itself takes as the main feature, as its config says it
    patches_only = _asked()  # whether the host asks for patches alone
    dropped_tokens = _asked()  # how many tokens of the tower the host drops at the front before the projector
    tiles = _asked()  # whether images are cut into tiles whose patches the host itself counts (anyres, spatial layout)
    image_token_id = _asked()  # the id that marks an image in `input_ids`

    @classmethod
    @abstractmethod
    def of(cls, model: Any) -> "Anatomy | None":
        """Describe a model, wrappers stripped; None: it is of another host.

        HostError: of this host, but unfinished, or with code of its own where images become embeddings.
        """

    # --- the decoder and the projector, alike on every host

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, 0..L-1; HostError for a decoder that keeps them elsewhere."""
        layers = getattr(self.decoder, "layers", None)
        if layers is None:
            raise HostError(
                f"{type(self.decoder).__name__} is not a decoder that llava_patch knows: it has no `layers`. Proven "
                f"decoders: {', '.join(known.DECODERS)}"
            )
        return layers

    norm = property(attrgetter("decoder.norm"))  # the decoder's final norm
    lm_head = property(attrgetter("model.lm_head"))  # the output head: hidden size to vocabulary
    embed_tokens = property(attrgetter("decoder.embed_tokens"))  # the token embedding
    text_config = property(attrgetter("decoder.config"))  # of the decoder (hidden_size, num_attention_heads, ...)
    # Vision channels to decoder hidden size.
    projector = property(lambda self: getattr(self.projector_owner, self.projector_name))
    # Where DeepStack's projector is beside it; LLaVA's scripts treat what starts like the projector alike.
    stack_name = property(lambda self: f"{self.projector_name}_stack")

    def first_linear(self) -> lora.Place:
        """The projector's first Linear as (parent module, attribute name, module); HostError where it has none."""
        return self.first_linears()[0]

    def first_linears(self) -> list[lora.Place]:
        """That Linear, and what else must be as wide: in peft's copies of the projector, and LoRA's matrices there."""
        found = [
            place
            for parent, name, _ in lora.copies(self.projector_owner, self.projector_name)
            for place in lora.first_linears(parent, name)
        ]
        if not found:
            raise HostError(f"the projector {type(self.projector).__name__} has no Linear layer to widen")
        return found

    # --- the vision tower, and which of its tokens the host takes

    vision_config = property(attrgetter("tower.config"))  # of the vision model; known before its weights are loaded

    def vision_parts(self) -> Tower:
        """Where the blocks of the loaded vision tower are, and what its tokens mean.

        HostError: the tower is not loaded yet, its class is not known (the message names what was not found), or it
        does not report its hidden states to this host.
        """
        if self.vision_model is None:
            raise HostError("the vision tower is not loaded yet: call its load_model() first")
        towers.check_reports(self.vision_model)
        return towers.describe(self.vision_model)

    def check_one_scale(self, what: str) -> None:
        """Refuse a tower of LLaVA's repository that sees an image in several scales; `what` does not know it."""
        if hasattr(self.tower, "s2_scales"):
            raise HostError(towers.SEVERAL_SCALES.format(what))

    _shape = property(lambda self: towers.shape_of(self.vision_config))
    vision_width = property(attrgetter("_shape.width"))  # channels of one token of the vision tower
    n_blocks = property(attrgetter("_shape.n_blocks"))  # number N of transformer blocks in the vision tower
    patch_size = property(attrgetter("_shape.patch_size"))  # side of one ViT patch in pixels of the processed image
    grid = property(attrgetter("_shape.grid"))  # rows and columns of the patch grid of one image (tile)

    @property
    def main_block(self) -> int:
        """The block whose output is the main feature, 1..N (LLaVA-1.5 selects -2: block N-1).

        HostError: the host itself selects several layers, or one that the tower does not have.
        """
        select = self.selected_layer
        if not isinstance(select, int):
            raise HostError(
                f"the model's own vision_feature_layer = {select} already fuses several layers; llava_patch needs one "
                "main layer (an integer)"
            )
        block = select if select >= 0 else self.n_blocks + 1 + select
        if not 1 <= block <= self.n_blocks:
            raise HostError(f"vision select layer {select} is outside the tower's {self.n_blocks} blocks")
        return block

    # Tokens that the tower puts before the patches (CLS, registers), dropped or not.
    prefix_tokens = property(lambda self: towers.prefix_tokens_of(self.vision_config))
    # Whether the host drops what comes before the patches (the CLS token) before the projector.
    drops_cls = property(lambda self: self.patches_only and self.prefix_tokens > 0)
    # Whether it drops the first patch, because it counts on a CLS token that the tower does not have.
    drops_patch = property(lambda self: self.dropped_tokens > self.prefix_tokens)

    # --- from images to the decoder

    # Whether it takes videos apart from images, through an encoder and an argument of their own.
    takes_videos = property(lambda self: hasattr(self.wrapper, self.video_encoder_name or "-"))

    @property
    def visual_tokens(self) -> dict[str, int]:
        """The arguments of the model's forward that bring images or videos, each with its placeholder's id."""
        return {self.pixels_argument: self.image_token_id}

    @property
    def encoder(self) -> tuple[Any, str]:
        """(owner, name) of the method that turns pixel values into projected visual tokens in the host's own path."""
        return self.wrapper, self.encoder_name

    @property
    def encoders(self) -> list[tuple[Any, str]]:
        """The `encoder`, and that of videos where the host has one."""
        return [self.encoder, *([(self.wrapper, self.video_encoder_name)] if self.takes_videos else [])]

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Projected visual tokens [images, tokens, hidden_size], through the host's own path (so with a patch, fused).

        On a model that cuts images into tiles: of single tiles, neither joined nor cut. `pixel_values` are [images, 3,
        height, width], normalised by the host's image processor.
        """
        return compat.one_tensor(getattr(*self.encoder)(pixel_values))

    def pixels_of(self, sample: dict[str, Any]) -> Any:
        """The images among the keyword arguments of the model's forward; None where it has none."""
        return sample.get(self.pixels_argument)


@contextlib.contextmanager
def made_of(where: str) -> Iterator[None]:
    """Turn what a library raises that makes something of a damaged file's values into one error that names the file."""
    try:
        yield
    except (LlavaPatchError, ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # of whatever class: the values reach code that counts on sound ones
        raise CheckpointError(
            f"{where}: nothing can be made of its values ({type(error).__name__}: {brief(error)}): correct them, or "
            "copy or download this file again"
        ) from error


def named_weights(anatomy: Anatomy) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by name, and those of a tower that the host keeps where the model does not list it."""
    yield from anatomy.model.named_parameters()
    if anatomy.tower_apart and anatomy.vision_model is not None:
        yield from ((f"vision tower: {name}", tensor) for name, tensor in anatomy.vision_model.named_parameters())


_MOST_LINEARS = 16
# Old releases stored these; every version computes them itself.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def is_computed(name: str) -> bool:
    """Whether a stored tensor is a table that the model computes by itself (rotary frequencies, position ids)."""
    return _COMPUTED.search(name) is not None


@dataclass(frozen=True)
class HostFiles:
    """A host's checkpoints.

    Tensors have one neutral spelling beside each host's own: `decoder.<name in the LlamaModel>`, `head.weight`,
    `projector.<k>.<weight or bias>` (the k-th Linear, from 0), `stack.<k>.<...>` (DeepStack's second projector),
    `tower.<name in the vision model>`, `image_newline`.
    """

    wrote: Callable[[dict[str, Any]], bool]  # whether a config.json is one of this host
    # The language model's configuration (LlamaConfig or MistralConfig) in a config.json.
    text_config: Callable[[dict[str, Any]], Any]
    feature_width: Callable[[dict[str, Any]], int]  # channels of one vision feature, by a config.json
    # The model of a config.json with its vision tower, made under `torch.device("meta")`; HostError where the host's
    # package, or its tower's configuration, is not there.
    skeleton: Callable[[dict[str, Any]], Any]
    linear: Callable[[int], str]  # the name of the projector's k-th Linear
    # For each neutral part the prefix of its tensors in the host's files, and a pattern of all names that they have in
    # files or in memory (which adapters take), whose group is the rest.
    parts: Mapping[str, tuple[str, str]]

    def neutral(self, name: str) -> str | None:
        """A tensor's name in the host's files, or in memory, in the neutral spelling; None when it is not known."""
        for part, (_, pattern) in self.parts.items():
            if (found := re.fullmatch(pattern, name)) is None:
                continue
            if part not in ("projector", "stack"):
                return f"{part}.{found[1]}" if found[1] else part
            linear, _, kind = found[1].rpartition(".")
            places = {"": 0, **{self.linear(k): k for k in range(_MOST_LINEARS)}}  # "": mm_projector_type = linear
            return f"{part}.{places[linear]}.{kind}" if linear in places and kind in ("weight", "bias") else None
        return None

    def written(self, name: str, single: bool = False) -> str:
        """A neutral name as the host's files have it; `single`: the projector is one Linear."""
        part, _, rest = name.partition(".")
        if part in ("projector", "stack"):
            place, _, kind = rest.partition(".")
            rest = kind if single else f"{self.linear(int(place))}.{kind}"
        return self.parts[part][0] + rest
