"""Nested MLPs, and smaller models cut out of them."""
