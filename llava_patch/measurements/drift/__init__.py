"""Drift of the shallow layers between a trained checkpoint and its base."""
