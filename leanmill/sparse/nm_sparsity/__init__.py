"""N:M sparsity by magnitude."""
