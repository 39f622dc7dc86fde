"""R-Probe results with numbers of one's own, for what reads results."""

from __future__ import annotations

import dataclasses

from llava_patch.measurements.rprobe.result import Part, RProbeResult
from llava_patch.measurements.rprobe.settings import RProbe


def made_up_result(mse=(0.2, 0.4, 0.6), shift: float = 0.0, steps: int = 4, **settings) -> RProbeResult:
    """A result whose held-out samples, one a document and 2 tokens each, have these errors plus the shift."""
    documents = [
        {
            "id": f"s{i}", "document": f"d{i}", "text": "t", "tokens": 2, "mse": m + shift, "psnr": 20.0,
            "variance": 1.0, "inside_mse": 0.5, "inside_pixels": 100, "outside_mse": 0.1, "outside_pixels": 292,
        }
        for i, m in enumerate(mse)
    ]  # fmt: skip
    mean = sum(d["mse"] for d in documents) / len(documents)
    losses = [1.0 - 0.1 * i for i in range(steps)]
    return RProbeResult(
        mse=mean, fvu=mean, psnr=20.0, constant_mse=1.0, constant_fvu=1.0, target_variance=1.0,
        mse_interval=(mean - 0.1, mean + 0.1), fvu_interval=(mean - 0.1, mean + 0.1),
        inside=Part(0.5, 1.0, 0.5, 0.25), outside=Part(0.1, 0.5, 0.2, 0.75),
        steps_to_threshold=3, threshold=0.75, threshold_is_vacuous=False, steps_to_half_fvu=None,
        documents=documents, losses=losses, running=losses,
        settings=dataclasses.asdict(RProbe(steps=steps, **settings)),
        facts={"data": "pages", "learning_rate": 0.003, "train_fvu": losses[-1]}, warnings=[],
    )  # fmt: skip
