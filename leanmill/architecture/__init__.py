"""Techniques that change how a model's layers are put together."""
