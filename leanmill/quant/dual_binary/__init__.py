"""Two binaries with a trained scale each."""
