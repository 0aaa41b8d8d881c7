"""One-shot pruning by weight times activation."""
