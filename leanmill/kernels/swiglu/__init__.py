"""The gate of most expert and dense feed-forward layers, in one pass each way."""
