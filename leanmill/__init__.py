"""Leanmill: train, fine-tune and compress small, sparse and low-bit language models."""

__version__ = "0.1.0"
