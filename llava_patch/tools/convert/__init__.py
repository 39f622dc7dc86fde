"""Checkpoints on disk, tensor by tensor: merging a patch into a plain one, and conversion between the two hosts."""
