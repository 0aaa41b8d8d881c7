"""Passes over a model folder, a block in memory at a time: one-shot compression with calibration."""
