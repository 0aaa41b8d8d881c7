"""Optimizers, wrappers over them and learning-rate schedules."""
