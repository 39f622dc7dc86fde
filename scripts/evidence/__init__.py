"""Puts what `llava-patch evidence` found into the project's own pages."""
