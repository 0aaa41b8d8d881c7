"""EvoPress: evolutionary search."""
