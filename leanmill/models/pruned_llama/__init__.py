"""Llama whose layers have sizes of their own: `import leanmill.models.pruned_llama.register` makes it known."""
