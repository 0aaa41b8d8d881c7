"""One-shot pruning by magnitude."""
