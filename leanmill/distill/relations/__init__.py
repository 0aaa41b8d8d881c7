"""Distillation of the relations between tokens in self-attention."""
