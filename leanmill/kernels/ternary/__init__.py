"""Weights of three levels, -s, 0 and s, and of two, -s and s."""
