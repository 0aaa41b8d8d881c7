"""Pruning heads and neurons while adapters train, by the gradients of the adapters."""
