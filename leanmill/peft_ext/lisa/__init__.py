"""Layers that take turns in training."""
