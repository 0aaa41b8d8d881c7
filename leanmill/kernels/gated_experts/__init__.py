"""Experts with a gate, both products and what stands between them, forward and backward."""
