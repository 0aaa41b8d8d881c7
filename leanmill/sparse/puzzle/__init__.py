"""Puzzle: attention and MLP of each layer replaced by what an integer program chooses among distilled alternatives."""
