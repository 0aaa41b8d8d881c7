"""Retraining a small part of a pruned model."""
