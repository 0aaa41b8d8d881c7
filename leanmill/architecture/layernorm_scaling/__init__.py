"""Norms scaled down with depth."""
