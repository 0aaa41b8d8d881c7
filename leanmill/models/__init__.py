"""Causal LMs: building on meta, materialising, activation checkpointing, compiling, exporting."""
