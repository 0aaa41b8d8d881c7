"""Levels of a row where its weights matter, by clusters."""
