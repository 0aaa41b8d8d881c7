"""Llama with linear attention beside a window: `import leanmill.models.linear_llama.register` makes it known."""
