"""Multi-layer vision fusion: taps, their combination, and how they attach to a tower."""
