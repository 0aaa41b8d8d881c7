"""Structured pruning: what the parts of a decoder block are, which to keep, cutting the others out."""
