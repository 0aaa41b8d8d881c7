"""The HTML report of a run, built from what its observers wrote. Imports no torch."""
