"""Mixtures of experts from a few numbers: what they come to, and the model family that can be built so."""
