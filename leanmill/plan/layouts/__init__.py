"""Which layout of ranks trains a recipe fastest, predicted before it starts."""
