"""Blocks dropped at random in training, with losses at early exits."""
