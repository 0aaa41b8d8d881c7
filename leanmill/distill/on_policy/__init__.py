"""Training on text that the student writes itself."""
