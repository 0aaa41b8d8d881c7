"""Cutting out heads and neurons that do nothing."""
