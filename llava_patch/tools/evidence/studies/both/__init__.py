"""Both methods on one model: Skip-Links on the projector, then LF behind it."""
