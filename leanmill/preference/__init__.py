"""Losses over pairs of answers to a prompt, of which one was preferred."""
