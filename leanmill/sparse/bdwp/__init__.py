"""Separate N:M masks for the forward and the backward matmul."""
