"""Divergence of two linear heads' distributions, without the whole [tokens, vocabulary] logits."""
