"""The `leanmill` command: train, plan, methods, check, schema, eval, export, report."""
