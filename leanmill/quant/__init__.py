"""Techniques that snap weights to levels."""
