"""Weights and activations rounded to uniform grids, with gradients for training them."""
