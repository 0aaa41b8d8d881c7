"""Masks whose thresholds are trained."""
