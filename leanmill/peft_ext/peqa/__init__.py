"""Integers that rest under scales that train."""
