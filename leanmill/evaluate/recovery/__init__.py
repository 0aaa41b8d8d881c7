"""PASER: which documents a pruned model should be trained on to recover what it lost."""
