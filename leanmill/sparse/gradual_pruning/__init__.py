"""Gradual pruning during training."""
