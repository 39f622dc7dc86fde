"""Settings of R-Probe as an auxiliary loss in training."""

from dataclasses import dataclass
from typing import ClassVar

from llava_patch.settings.checks import BROKEN, choice, fraction, integer, number

ROPE_FORMS = ("attention", "embedding")


@dataclass(frozen=True)
class AuxiliaryProbe:
    """R-Probe as an auxiliary loss in training: loss = next-token loss + weight * MSE of rebuilt pixels.

    Source: "Detached Skip-Links and R-Probe", figure 4, section 5.3 and appendix D.1 (table 4). A copy of the first
    quarter of the decoder's layers rebuilds the pixels of a text region from the projected visual tokens and the
    region's text, on the samples that carry a region (see docs/rprobe.md). Its gradient reaches the projector
    and the vision tower as far as they train, and nothing of the decoder or the token embeddings. The paper gives no
    weight, share of steps or learning rate: those defaults are this project's choice.

    Attributes:
        weight: lambda >= 0. 0 builds no head and leaves training as it is, bit for bit.
        share: share of the steps on which the loss is computed, 0..1. A step is an optimizer step, with all its
            accumulated batches; which ones is decided from `seed` and the step's number alone, so that all ranks and a
            resumed run agree.
        max_text_tokens: longer texts are cut to this many tokens.
        rope: as in RProbe: "attention" or "embedding".
        lr: learning rate of the head; None: that of the run.
        seed: of the head's new weights and of the choice of steps.
        broken: what becomes of a region that turns out unusable when its image is read (outside the image, cropped
            away, a text without tokens): "stop" with an error, or "skip" it with a warning and train on the rest.
    """

    KIND: ClassVar[str] = "probe"

    weight: float = 0.1
    share: float = 1.0
    max_text_tokens: int = 64
    rope: str = "attention"
    lr: float | None = None
    seed: int = 0
    broken: str = "stop"

    def __post_init__(self) -> None:
        number("AuxiliaryProbe", "weight", self.weight, 0)
        fraction("AuxiliaryProbe", "share", self.share)
        integer("AuxiliaryProbe", "max_text_tokens", self.max_text_tokens, 1)
        integer("AuxiliaryProbe", "seed", self.seed, 0)
        if self.lr is not None:
            number("AuxiliaryProbe", "lr", self.lr, above=0)
        choice("AuxiliaryProbe", "rope", self.rope, ROPE_FORMS)
        choice("AuxiliaryProbe", "broken", self.broken, BROKEN)
