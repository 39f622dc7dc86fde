"""What a checkpoint is and holds, from its files alone."""

from llava_patch.tools.inspect.read import inspect_checkpoint
from llava_patch.tools.inspect.result import Inspection

__all__ = ["Inspection", "inspect_checkpoint"]
