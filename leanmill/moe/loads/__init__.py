"""How many tokens each expert gets: counted once a layer, reduced for all layers at once, read by all techniques."""
