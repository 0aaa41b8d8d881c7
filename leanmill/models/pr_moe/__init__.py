"""PR-MoE as a model family of transformers: `import leanmill.models.pr_moe.register` makes it known there."""
