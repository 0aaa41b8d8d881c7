"""Causal LMs: building on meta, pretrained ones, materialising, activation checkpointing, compiling, FLOPs."""
