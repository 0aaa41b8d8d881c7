"""Models without some of their decoder blocks, or halves of them."""
