"""Integer grids with scales from the data."""
