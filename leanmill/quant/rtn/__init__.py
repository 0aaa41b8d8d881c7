"""Rounding to the nearest level, in one shot."""
