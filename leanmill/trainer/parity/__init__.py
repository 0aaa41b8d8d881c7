"""Whether many ranks train what one process trains: a few steps each, held side by side."""
