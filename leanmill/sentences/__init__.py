"""Losses over vectors of texts."""
