"""Distillation of vectors of texts."""
