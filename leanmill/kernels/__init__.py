"""Tensor operations that deserve more than plain code: a reference, fast paths, one entry each."""
