"""The reader, and what R-Probe says of it on pages and with features that are damaged on purpose."""

from typing import Any

from llava_patch.tools.evidence.small import digits, reader
from llava_patch.tools.evidence.statistics import pack_bits
from llava_patch.tools.evidence.study import Context, Run

READER = "rprobe/reader"


def teach(context: Context) -> dict[str, Any]:
    """Teach the small model to read; keeps its weights, and as "dense.…" those of its tower before it was tuned."""
    lessons = reader.Lessons().scaled(context.size.scale)
    model = reader.new(context.seed).to(context.device)
    named, dense = reader.teach(model, digits.draw(lessons.images, context.seed, held_out=False), lessons, context.seed)
    context.keep({**reader.weights(model), **{f"dense.{name}": value for name, value in dense.items()}})
    held = digits.evaluate(model, digits.draw(reader.HELD, context.seed, held_out=True))
    other = digits.evaluate(model, digits.draw(reader.HELD, context.seed + 1000, held_out=False))
    return {
        "held": pack_bits(held.right),
        "held_loss": held.loss,
        "trained_strings_other_images": other.exact,
        "patches_named": named,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": [lessons.dense.steps, lessons.answers.steps, lessons.together.steps],
    }


RUNS = (Run("reader", teach, quick=True, seconds=150),)
