"""Token copies sorted by expert, and summed back to tokens."""
