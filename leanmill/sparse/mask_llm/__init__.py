"""Learned N:M masks over frozen weights."""
