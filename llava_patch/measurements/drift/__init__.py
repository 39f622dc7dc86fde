"""Drift of the shallow layers between a trained checkpoint and its base."""

from llava_patch.measurements.drift.measure import measure_drift, measure_drift_apart
from llava_patch.measurements.drift.result import Drift, DriftCurves, DriftResult

__all__ = ["Drift", "DriftCurves", "DriftResult", "measure_drift", "measure_drift_apart"]
