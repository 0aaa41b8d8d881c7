"""A recipe: its sections, the rules between them, reading, errors, schema. Imports no torch."""
