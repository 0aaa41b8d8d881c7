"""Experts of different bits."""
