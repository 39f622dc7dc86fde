"""R-Probe on the quickstart's small model: the modality ablation, and features that were blurred on purpose."""
