"""`llava-patch inspect`: what a checkpoint is and holds, from its files alone."""

from llava_patch.inspection.read import Inspection, inspect_checkpoint

__all__ = ["Inspection", "inspect_checkpoint"]
