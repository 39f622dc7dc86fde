"""R-Probe against reading: over checkpoints of one training, over graded damage, and as an auxiliary loss."""
