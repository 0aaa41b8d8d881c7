"""Layer-adaptive budgets by dynamic programming."""
