"""Unstructured sparse training with masks that move: SET and RigL."""
