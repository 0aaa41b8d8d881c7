"""Llama with partly rotary keys and a latent: `import leanmill.models.latent_llama.register` makes it known."""
