"""Codes of a few bits packed into bytes: 1, 2, 4 or 8 bits each, or five base-3 digits a byte."""
