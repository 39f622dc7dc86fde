"""A vision tower for the `llava` package that is not CLIP: CLIPVisionTower's interface over the other vision models."""

import copy
from operator import attrgetter
from typing import Any

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from torch import Tensor, nn

from llava_patch.core.errors import HostError
from llava_patch.hosts.towers import layout as towers
from llava_patch.hosts.towers import models as tower_models


def build(name: Any, args: Any, delay_load: bool = False) -> "VisionTower | None":
    """The tower that a LLaVA configuration names; None where llava's own builder has to decide (CLIP, no such folder).

    `name` is `mm_vision_tower` or the script's --vision_tower, `args` the configuration or the script's model
    arguments; `delay_load` reads the configuration only. HostError: a tower that is not known, or multi-scale (S2)
    features of one that is not CLIP.
    """
    config = tower_models.read_config(name) if isinstance(name, str) else None
    if config is None:
        return None
    if getattr(args, "s2", False):
        raise HostError(f"--s2 with the vision tower {name}: multi-scale features are made of CLIP towers only")
    return VisionTower(name, args, config, delay_load)


class VisionTower(CLIPVisionTower):
    """llava's CLIPVisionTower around another vision model; its features, sizes, device and dtype are asked as of CLIP.

    `select_feature` "patch" leaves out what the tower puts before the patches, and nothing of one without CLS.
    """

    def __init__(self, name: str, args: Any, config: Any, delay_load: bool = False) -> None:
        nn.Module.__init__(self)  # llava's own would load a CLIP
        self.is_loaded = False
        self.vision_tower_name = name
        self.select_layer = args.mm_vision_select_layer
        self.select_feature = getattr(args, "mm_vision_select_feature", "patch")
        self._own_config = config
        self._config = _plain_config(name, config)
        if not delay_load or getattr(args, "unfreeze_mm_vision_tower", False):
            self.load_model()

    def load_model(self, device_map: Any = None) -> None:
        """Load image processor and weights, which do not train unless somebody says so."""
        if self.is_loaded:
            print(f"{self.vision_tower_name} is already loaded, `load_model` called again, skipping.")
            return
        config = self._own_config
        self.image_processor = tower_models.load_processor(self.vision_tower_name, config, self.config.image_size)
        self.vision_tower = tower_models.load_model(self.vision_tower_name, config, device_map)
        self.vision_tower.requires_grad_(False)
        self.is_loaded = True

    def feature_select(self, image_forward_outs: Any) -> Tensor:
        """The main feature, [images, tokens, channels]; ValueError for a select_feature that llava does not know."""
        if self.select_feature == "patch":
            return image_forward_outs.hidden_states[self.select_layer][:, self.config.num_prefix_tokens :]
        return super().feature_select(image_forward_outs)

    # The vision model's, its sizes as the plain numbers that llava computes with.
    config = property(attrgetter("_config"))


def _plain_config(name: str, config: Any) -> Any:
    """A copy that holds num_hidden_layers, hidden_size, image_size, patch_size and num_prefix_tokens as integers.

    The classes disagree: InternVL has lists, NaFlex no image_size, timm's wrapper none of them.
    """
    shape = towers.shape_of(config)
    rows, columns = shape.grid
    if rows != columns:
        raise HostError(f"vision tower {name} has a grid of {rows} x {columns} patches: llava knows square ones only")
    plain = copy.deepcopy(config)
    plain.num_prefix_tokens = towers.prefix_tokens_of(config)
    plain.num_hidden_layers, plain.hidden_size = shape.n_blocks, shape.width
    plain.image_size, plain.patch_size = rows * shape.patch_size, shape.patch_size
    return plain
