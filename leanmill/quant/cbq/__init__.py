"""Rounding and steps of several blocks, trained together on what the blocks compute."""
