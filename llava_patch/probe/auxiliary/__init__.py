"""R-Probe's decoder as an auxiliary loss in training."""
