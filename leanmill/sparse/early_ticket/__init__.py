"""Masks that are drawn once they have settled."""
