"""Routers that skip attention in a frozen model."""
