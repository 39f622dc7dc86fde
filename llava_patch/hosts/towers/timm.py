"""timm's ViTs (Perception Encoder) as vision towers; apart from the others because it imports timm."""

from typing import Any

from torch import Tensor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

from llava_patch.hosts.towers.classes import with_states


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
