"""Gradient reach: which parameters a training step gives a gradient, and through which layers the image gets one."""
