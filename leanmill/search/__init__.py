"""Searches for the level of each layer under a budget."""
