"""Contrastive learning of vectors of texts."""
