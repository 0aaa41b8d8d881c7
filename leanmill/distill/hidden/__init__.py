"""Distillation of hidden states."""
