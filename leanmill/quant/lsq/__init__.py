"""Learned step sizes."""
