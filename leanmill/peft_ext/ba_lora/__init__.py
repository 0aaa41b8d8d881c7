"""Regularisers of what an adapted model says."""
