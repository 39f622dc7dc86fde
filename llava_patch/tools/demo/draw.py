"""The demo's pictures and words: where image tokens went, and the answer's attention, drawn over the image."""

import numpy as np
from PIL import Image
from torch import Tensor

from llava_patch.tools.demo.compute import Answer

SIDE = 448  # pixels that a picture has at least
LEFT, AROUND = (40, 40, 40), (66, 120, 200)  # of tokens that leave for good, and that come back
HEAT = (255, 140, 0)


def tokens_picture(answer: Answer) -> Image.Image:
    """The image: as it is where a token passes every layer, blue where it leaves some out and returns, dark where not.

    How strong the colour is says how many of the layers it leaves out.
    """
    missed = 1 - answer.runs.float().mean(0).numpy()
    back = answer.runs[-1].numpy()
    colour = np.where(back[..., None], np.array(AROUND), np.array(LEFT))
    return _over(answer.pixels, colour, np.where(missed > 0, 0.35 + 0.5 * missed, 0.0))


def attention_picture(answer: Answer, layer: int) -> Image.Image:
    """Where the answer's first token looks in one layer, orange; grey where the layer has no such image token."""
    found = answer.attention[layer].numpy()
    there = ~np.isnan(found)
    grey = np.asarray(Image.fromarray(answer.pixels).convert("L").convert("RGB"))
    highest = found[there].max() if there.any() else 0.0
    strength = np.where(there, found, 0.0) / max(highest, 1e-12)
    colour = np.where(there[..., None], np.array(HEAT), np.array(LEFT))
    return _over(grey, colour, np.where(there, 0.85 * strength, 0.6))


def _over(pixels: np.ndarray, colour: np.ndarray, opacity: np.ndarray) -> Image.Image:
    """A colour each cell over an image: uint8 [height, width, 3] under [rows, columns, 3] and [rows, columns]."""
    height, width = pixels.shape[:2]
    row = np.arange(height) * opacity.shape[0] // height
    column = np.arange(width) * opacity.shape[1] // width
    alpha = opacity[row][:, column, None]
    mixed = (1 - alpha) * pixels + alpha * colour[row][:, column]
    grown = max(1, -(-SIDE // min(height, width)))
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    return picture.resize((grown * width, grown * height), Image.Resampling.NEAREST)


def tokens_words(answer: Answer) -> str:
    """Which layers how many of the drawn tokens pass: "8 of 16 image tokens: all 6 layers; 8: layers 0-1"."""
    runs = answer.runs.flatten(1).T
    kinds: dict[tuple[bool, ...], int] = {}
    for row in runs.tolist():
        kinds[tuple(row)] = kinds.get(tuple(row), 0) + 1
    parts = [f"{count}: {_layers(kind)}" for kind, count in sorted(kinds.items(), key=lambda one: -sum(one[0]))]
    return f"of {len(runs)} image tokens " + "; ".join(parts)


def _layers(kind: tuple[bool, ...]) -> str:
    """A token's layers in words."""
    if all(kind):
        return f"all {len(kind)} layers"
    spans: list[list[int]] = []
    for layer in (number for number, runs in enumerate(kind) if runs):
        if spans and layer == spans[-1][1] + 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    named = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return f"layers {', '.join(named)} of {len(kind)}" if named else "no layer"


def mass(attention: Tensor) -> float:
    """The share of the attention of the answer's first token that lies on the drawn image tokens: [rows, columns]."""
    return float(attention.nansum())


def timings(stock: Answer, patched: Answer) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of times: one run each, not a benchmark."""
    head = ["", "stock", "patched", "patched / stock"]
    rows = []
    for what, name in (("first token (ms)", "prefill_ms"), ("each further token (ms)", "decode_ms")):
        one, other = getattr(stock, name), getattr(patched, name)
        ratio = "-" if one is None or other is None else f"{other / one:.2f}"
        rows.append([what, *("-" if value is None else f"{value:.1f}" for value in (one, other)), ratio])
    rows.append(["tokens answered", str(stock.tokens), str(patched.tokens), ""])
    rows.append(["tokens of the prompt", str(stock.prompt_tokens), str(patched.prompt_tokens), ""])
    return head, rows
