"""Attention maps of a ViT block, checkpoints side by side."""
