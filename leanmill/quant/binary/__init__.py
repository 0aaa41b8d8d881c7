"""Weights of one bit."""
