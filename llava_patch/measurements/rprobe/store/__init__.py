"""Frozen visual tokens, computed once: into memory-mapped shards on disk, or in memory."""

from llava_patch.measurements.rprobe.store.data import Batch, FrozenData
from llava_patch.measurements.rprobe.store.freeze import SHARD_IMAGES, evaluation, freeze_samples
from llava_patch.probe.view import make_transform

__all__ = ["SHARD_IMAGES", "Batch", "FrozenData", "evaluation", "freeze_samples", "make_transform"]
