"""SliceGPT: the residual stream rotated to its principal components, the least of which go."""
