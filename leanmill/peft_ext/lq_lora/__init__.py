"""Weights as codes of few bits plus a delta of low rank."""
