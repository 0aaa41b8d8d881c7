"""Activations times packed weights, without ever holding the unpacked weight."""
