"""Heads and neurons that fluctuate little go, and biases take their place."""
