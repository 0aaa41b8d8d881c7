"""Codes that move a few at a time, under levels that train."""
