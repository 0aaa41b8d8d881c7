"""Weights snapped to {-s, 0, s}."""
