"""Techniques that zero weights."""
