"""Mixtures of experts: one folder a technique."""
