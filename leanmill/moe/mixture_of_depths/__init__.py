"""Blocks that run for a share of the tokens."""
