"""Models with fewer channels, heads, neurons and layers."""
