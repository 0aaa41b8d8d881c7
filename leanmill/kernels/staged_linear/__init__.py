"""A linear layer whose staged weight is recomputed in backward instead of kept."""
