"""Models whose neighbouring decoder blocks share weights."""
