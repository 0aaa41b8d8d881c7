"""Distillation of next-token distributions."""
