"""Frozen visual tokens, computed once: into memory-mapped shards on disk, or in memory."""
