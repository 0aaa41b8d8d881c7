"""Techniques that learn from a teacher."""
