"""Merging models that were trained apart from one start."""
