"""Low-rank changes merged into a weight, with gradients that stay low-rank."""
