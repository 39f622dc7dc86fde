"""From lmms-eval's model object to what a measurement needs: model, tokenizer, image processor, inputs."""

from __future__ import annotations

from typing import Any

from llava_patch.core.errors import HostError
from llava_patch.data.inputs import Inputs
from llava_patch.hosts.anatomy import find
from llava_patch.integrations.lmms_eval.fail_fast import model_of


def reach(lm: Any) -> Inputs:
    """Find model, tokenizer and processors in lmms-eval's `llava` and `llava_hf` models.

    Raises:
        HostError: another kind of model; the message says which ones work.
    """
    model = model_of(lm)
    tokenizer = getattr(lm, "tokenizer", None)
    processor = getattr(lm, "_image_processor", None)
    if model is None or tokenizer is None or processor is None:
        raise HostError(
            f"llava_patch's tasks look inside the model and know lmms-eval's `llava` and `llava_hf`; "
            f"{type(lm).__name__} has no model, tokenizer and image processor to look at"
        )
    anatomy = find(model)
    joint = processor if hasattr(processor, "image_processor") else None
    if (joint is not None) != anatomy.ids_hold_places:
        raise HostError(f"{type(processor).__name__} is not the processor of a model of the host {anatomy.host!r}")
    return Inputs(
        anatomy=anatomy,
        tokenizer=tokenizer,
        image_processor=processor if joint is None else joint.image_processor,
        processor=joint,
        conversation=getattr(lm, "conv_template", None),
    )
