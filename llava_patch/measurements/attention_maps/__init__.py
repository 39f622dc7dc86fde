"""Attention maps of a ViT block, checkpoints side by side."""

from llava_patch.measurements.attention_maps.measure import map_of, measure_attention_maps
from llava_patch.measurements.attention_maps.result import AttentionMaps, AttentionMapsResult, CheckpointMaps

__all__ = ["AttentionMaps", "AttentionMapsResult", "CheckpointMaps", "map_of", "measure_attention_maps"]
