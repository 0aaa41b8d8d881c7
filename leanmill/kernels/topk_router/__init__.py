"""Scores, top-k, combine weights, counts and side losses of a router in one pass over its logits."""
