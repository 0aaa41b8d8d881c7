"""Tokens whose gradients conflict with those of their expert."""
