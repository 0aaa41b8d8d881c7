"""Techniques that add trainable parameters to a frozen model."""
