"""Importing this makes Leanmill's own model families known to transformers."""

import leanmill.models.folded_llama.register
import leanmill.models.latent_llama.register
import leanmill.models.linear_llama.register
import leanmill.models.pr_moe.register
import leanmill.models.pruned_llama.register
import leanmill.peft_ext.side_network.register  # noqa: F401
