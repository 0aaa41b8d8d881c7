"""Mixtures of experts made of models that exist: of dense ones, and of mixtures with fewer experts."""
