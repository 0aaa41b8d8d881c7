"""One-shot pruning by a matrix-free inverse of the Fisher matrix."""
