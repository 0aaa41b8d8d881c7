"""Adapt-Pruner: a little less of every layer at a time, by how much the layer does."""
