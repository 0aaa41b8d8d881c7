"""Llama whose neighbouring layers share weights: `import leanmill.models.folded_llama.register` makes it known."""
