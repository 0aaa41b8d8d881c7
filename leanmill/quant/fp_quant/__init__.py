"""Floating-point and block floating-point formats of 4 to 8 bits."""
