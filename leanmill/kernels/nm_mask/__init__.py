"""Masks that keep the N largest of every M weights."""
