"""One learned scale a row, and for each number of bits the grid that suits it."""
