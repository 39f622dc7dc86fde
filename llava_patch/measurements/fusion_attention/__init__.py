"""Text-to-image attention of the fusion layers, head by head, in a trained checkpoint and its base."""
