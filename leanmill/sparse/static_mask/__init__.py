"""Training with the zeros that a model came with."""
