"""Runs inside an environment: `python -m canary.smoke HOST FOLDER` prints a line of JSON a step.

FOLDER keeps a small random LLaVA-1.5, made from its configuration, and the patched checkpoint that is saved of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 8, "num_attention_heads": 2, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}


class Smoke:
    """The steps, in order; each needs the one before it."""

    def __init__(self, host: str, folder: Path) -> None:
        self.host, self.folder = host, folder
        self.saved = folder / f"patched-{host}"

    def stock(self) -> None:
        """Load a stock checkpoint."""
        from quickstart.fileset import write_fileset

        files = write_fileset(self.folder / self.host, vision=VISION, text=TEXT, vocab_size=512)
        self.subject = _load(files.hf if self.host == "hf" else files.llava)

    def patch(self) -> None:
        """Put a fusion and routing on it."""
        from llava_patch import Routing, SkipLinks, patch

        self.handle = patch(self.subject.model, fusion=SkipLinks(stride=2), routing=Routing(split=2, freeze="none"))

    def forward(self) -> None:
        """Forward and backward; gradients reach the side branch."""
        loss = self.subject.model(**self._inputs(), use_cache=False).loss
        loss.backward()
        branch = [p for n, p in self.subject.model.named_parameters() if "side_branch" in n]
        assert loss.isfinite() and branch and all(p.grad is not None for p in branch)
        self.loss = float(loss)

    def generate(self) -> None:
        """Four tokens; another image gives others, or at least other logits."""
        import torch

        inputs = self.subject.inputs().forward_inputs(_image(0), "What is the number?")
        other = self.subject.inputs().forward_inputs(_image(255), "What is the number?")
        with torch.no_grad():
            one, two = (self.subject.model(**i).logits[:, -1] for i in (inputs, other))
            prompt = {("inputs" if self.host == "llava" and k == "input_ids" else k): v for k, v in inputs.items()}
            self.subject.model.generate(**prompt, do_sample=False, max_new_tokens=4)
        assert not torch.equal(one, two)

    def save(self) -> None:
        """Save a full checkpoint."""
        self.handle.save(self.saved, "full")

    def load(self) -> None:
        """Load it through the host's own loader: the same patch, the same loss."""
        from llava_patch.patching.handle import get_handle

        self.subject = _load(self.saved)
        assert get_handle(self.subject.model).routing == self.handle.routing
        again = float(self.subject.model(**self._inputs(), use_cache=False).loss)
        assert again == self.loss, f"the loss is {again}, and was {self.loss}"

    def _inputs(self) -> Any:
        return self.subject.inputs().training_inputs(_image(), "What is the number?", "473")


def _load(folder: Path) -> Any:
    from llava_patch.data.loaded import load_subject

    return load_subject(str(folder), device="cpu", dtype="float32")


def _image(level: int | None = None) -> Any:
    import numpy as np
    from PIL import Image

    if level is not None:
        return Image.fromarray(np.full((56, 56, 3), level, np.uint8))
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8))


STEPS = ("stock", "patch", "forward", "generate", "save", "load")


def main(host: str, folder: Path) -> None:
    """Try them until one fails; those behind it are not tried."""
    smoke = Smoke(host, folder)
    for name in STEPS:
        try:
            getattr(smoke, name)()
        except Exception as error:
            print(json.dumps({"step": name, "error": f"{type(error).__name__}: {error}"}), flush=True)
            raise
        print(json.dumps({"step": name, "error": None}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
