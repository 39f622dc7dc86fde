"""Routing of image tokens around deep decoder layers: plan, side branch, cache, attachment."""
