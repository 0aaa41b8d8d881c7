"""One-shot pruning with corrected survivors."""
