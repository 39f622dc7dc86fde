"""Settings of R-Probe; like the package's other settings this file imports no torch."""

from dataclasses import dataclass

from llava_patch.settings.checks import BROKEN, choice, flag, integer, number, refused

ROPE_FORMS = ("attention", "embedding")
IMAGE_MODES = ("resize", "crop", "pad", "window", "anyres")
TRAINED = ("all", "lora", "head")
_CHOICES = {"rope": ROPE_FORMS, "image_mode": IMAGE_MODES, "trained": TRAINED, "broken": BROKEN}
_COUNTS = (
    "steps", "batch_size", "train_pages", "heldout_pages", "max_text_tokens", "boxes_per_sample", "lora_rank",
    "save_every", "resamples",
)  # fmt: skip


@dataclass(frozen=True)
class RProbe:
    """R-Probe: a small decoder rebuilds pixels from projected visual tokens; its error says what they keep.

    Source: "Detached Skip-Links and R-Probe", section 5 and appendix D. From the paper: decoder of the first quarter
    of the LLM's layers, `rope` (see below), `threshold`, `image_mode` (images are resized), the two ablations. The
    paper gives no optimiser, data size, batch size or number of steps (its curves need about 2,000 steps to reach the
    threshold on 8B models): those defaults are this project's choice and are meant for small models.

    Attributes:
        steps: optimiser steps.
        batch_size: samples a step.
        lr: peak learning rate of AdamW; None: 3e-3 up to hidden size 128, falling as 1/hidden above (9.4e-5 at 4096).
        weight_decay: of AdamW.
        warmup: share of the steps over which the learning rate rises, before its cosine fall to zero.
        clip: largest gradient norm.
        train_pages: rendered pages to train on, when no samples are given.
        heldout_pages: rendered pages that are only measured, when no samples are given.
        heldout_share: share of the documents held out, when samples are given.
        seed: of pages, split, head and order of samples.
        rope: "attention" rotates queries and keys by (row, column); "embedding" reads the paper's sentence as a
            rotation of the visual tokens themselves, before they are reordered, under the model's own 1-D rotary.
        image_mode: how an image becomes square: "resize" (stretched, whole image kept), "crop" (the image processor's
            own shortest edge and centre crop) or "pad" (padded with the mean colour first). "window" shows of each page
            the square part around the sample's region in which its text is `text_height` tokens high, or higher: for
            pages whose lines are lower than a token. "anyres" is the tiling of models that cut images into tiles; the
            other modes show those models one square as well, their overview tile.
        text_height: least height of a region's text, in tokens, with image_mode = "window"; the height of its lowest
            box counts.
        page: with image_mode = "window", show the whole page as well, resized: a second image, in front of the window,
            whose tokens are context. For checkpoints that were trained on several images.
        threshold: per-token MSE under which the paper calls a reconstruction visually coherent; 0.75.
        masked: the box is blacked out in the original image; the loss is still against the unmasked pixels.
        text: False replaces every text token by the unknown token.
        max_text_tokens: longer texts are cut to this many tokens.
        examples: held-out reconstructions that are kept for figures.
        maps: held-out pages that are rebuilt whole, for error maps.
        boxes_per_sample: text regions of one image that make one sample; their tokens are targets together.
        broken: what becomes of a sample that cannot be used (its image is missing or broken, its box empty or outside):
            "stop" with an error, or "skip" and count it.
        trained: "all" layers of the decoder; "lora": low-rank updates of its linear layers and the pixel head;
            "head": the pixel head alone. Figures of the last two are not comparable with the paper's or the first's.
        lora_rank: rank of those updates.
        store: keep frozen tokens on disk ($LLAVA_PATCH_CACHE), where the next run of model and data finds them.
        store_gb: size in GB that the stores on disk together do not exceed; the longest unused are deleted first.
        save_every: steps between two states from which an interrupted run goes on.
        keep_decoder: leave the trained decoder beside the result (at 7B 6.4 GB), so that other figures of the same run
            need no training.
        minutes: training ends at the first step after so many minutes (earlier starts of the run count too) and the
            result says so; None: after `steps`.
        resamples: bootstrap resamples behind a 95 % interval.
    """

    steps: int = 400
    batch_size: int = 32
    lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip: float = 1.0
    train_pages: int = 2000
    heldout_pages: int = 256
    heldout_share: float = 0.2
    seed: int = 0
    rope: str = "attention"
    image_mode: str = "resize"
    text_height: float = 1.5
    page: bool = False
    threshold: float = 0.75
    masked: bool = False
    text: bool = True
    max_text_tokens: int = 64
    examples: int = 6
    maps: int = 2
    boxes_per_sample: int = 1
    broken: str = "stop"
    trained: str = "all"
    lora_rank: int = 16
    store: bool = True
    store_gb: float = 20.0
    save_every: int = 200
    keep_decoder: bool = False
    minutes: float | None = None
    resamples: int = 2000

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "seed", "examples", "maps"):
            integer("RProbe", name, getattr(self, name), int(name in _COUNTS))
        for name in ("clip", "threshold", "store_gb", "text_height", "lr", "minutes"):
            if getattr(self, name) is not None or name not in ("lr", "minutes"):
                number("RProbe", name, getattr(self, name), above=0)
        number("RProbe", "weight_decay", self.weight_decay, 0)
        number("RProbe", "warmup", self.warmup, 0, below=1)
        number("RProbe", "heldout_share", self.heldout_share, above=0, below=1)
        for name, choices in _CHOICES.items():
            choice("RProbe", name, getattr(self, name), choices)
        for name in ("masked", "text", "store", "page", "keep_decoder"):
            flag("RProbe", name, getattr(self, name))
        for name in ("text_height", "page") if self.image_mode != "window" else ():
            if getattr(self, name) != getattr(RProbe, name):
                raise refused(
                    "RProbe", name, getattr(self, name), f'image_mode = "window" with it, not "{self.image_mode}"'
                )

    def learning_rate(self, hidden_size: int) -> float:
        """Peak learning rate for a decoder of that width."""
        return self.lr if self.lr is not None else 3e-3 * min(1.0, 128 / hidden_size)
