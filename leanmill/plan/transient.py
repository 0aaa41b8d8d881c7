"""What a micro-batch keeps until its backward, estimated from shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from leanmill.kernels.linear_cross_entropy.chunks import rows_a_chunk
from leanmill.models.expert_sizes import NUM_EXPERTS
from leanmill.recipe.root import Recipe


def activation_bytes(recipe: Recipe, config: Any, token_shares: Sequence[float]) -> int:
    """Estimate the activations that one micro-batch keeps for backward.

    For each token and layer of a pre-norm block with gated MLP, in compute dtype: two norms' outputs,
    query, key, value, attention's output in and out of its reshape, and 4 tensors of the MLP's width (of
    top_k and shared experts); in fp32: what each of the two norms keeps. Latent attention also keeps what queries,
    keys and values are made of. With `full` recomputation a
    layer keeps its input and one layer is alive at a time; `selective` also keeps matmul outputs. Layers that run
    for a share of the tokens keep that share. With expert parallelism recomputation keeps what came from other ranks;
    of fully sharded experts too, but only the run knows which tokens travel, so that is not counted.
    Ranks that share matmuls keep their part of what is neither hidden state nor norm, and with `sequence_parallel` of
    these.
    Every further token that is predicted keeps a layer's, what the matmul before it takes and returns, and what three
    norms keep.
    """
    size = 2 if recipe.train.precision == "bf16" else 4
    tp = recipe.layout.tp
    hidden = config.hidden_size / (tp if recipe.layout.sequence_parallel else 1)
    inner, (projected, attended) = mlp_width(config) / tp, (width / tp for width in attention_widths(config))
    whole = size * (2 * hidden + projected + 2 * attended + 4 * inner) + 4 * 4 * hidden
    matmuls = size * (2 * hidden + projected + attended + 2 * inner)
    further = num_further_tokens(recipe)
    tokens, layers = recipe.batch.tokens_per_micro_batch, sum(token_shares) + further
    received = _received_bytes(recipe, config, size)
    kept = {
        "none": layers * whole,
        "selective": layers * (matmuls + size * hidden + received) + whole,
        "full": layers * (size * hidden + (0 if recipe.layout.expert_resend else received)) + whole,
    }
    between = further * (size * 4 * hidden + 4 * 6 * hidden)
    return int(tokens * (kept[recipe.train.activation_checkpointing] + between))


def num_further_tokens(recipe: Recipe) -> int:
    """Return how many tokens every position predicts beside the next."""
    return sum(technique.further_tokens() for technique in recipe.techniques)


def _received_bytes(recipe: Recipe, config: Any, size: int) -> float:
    """Tokens that came to experts here and results that came back, for one token of a layer.

    A token goes once to each rank with any of its experts, its own included; experts are taken as chosen evenly.
    """
    num_ranks, top_k = recipe.layout.ep, getattr(config, "num_experts_per_tok", None)
    found = (getattr(config, name, None) for name in NUM_EXPERTS)
    num_experts = next((number for number in found if isinstance(number, int)), None)
    if num_ranks == 1 or num_experts is None or not isinstance(top_k, int):
        return 0.0
    elsewhere = math.comb(num_experts - num_experts // num_ranks, top_k) / math.comb(num_experts, top_k)
    return num_ranks * (1 - elsewhere) * (2 * size * config.hidden_size + 8 * top_k)


def attention_widths(config: Any) -> tuple[int, int]:
    """Widths of all that projections of attention return, and of what attention itself does, for a token."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = getattr(config, "kv_lora_rank", None)
    if latent is None or not hasattr(config, "qk_rope_head_dim"):  # each key-value head has a rotated part of its own
        keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        return heads * head_dim + 2 * keys + (latent or 0), heads * head_dim
    # Keys and values of every head are made of one latent and one rotated part.
    compressed = latent + config.qk_rope_head_dim + (config.q_lora_rank or 0)
    return compressed + heads * (2 * config.qk_head_dim + config.v_head_dim), heads * config.v_head_dim


def mlp_width(config: Any) -> int:
    """Width of the MLP that a token goes through, of all its experts together."""
    width = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    top_k = getattr(config, "num_experts_per_tok", None)
    if not isinstance(top_k, int):
        return width
    shared = (getattr(config, name, None) for name in ("n_shared_experts", "moe_num_shared_experts"))
    return (top_k + sum(n for n in shared if isinstance(n, int))) * (
        getattr(config, "moe_intermediate_size", None) or width
    )


def logits_bytes(recipe: Recipe, vocab_size: int, hidden_size: int) -> int:
    """Estimate what the loss keeps at once: logits of a chunk of tokens and the head's fp32 gradient.

    That gradient is made with the loss, before backward reaches the head; one for every token that a position
    predicts. A teacher brings logits of its own.
    """
    size = 2 if recipe.train.precision == "bf16" else 4
    num_models = 1 + sum(technique.num_frozen_logits() for technique in recipe.techniques)
    chunk = recipe.train.logits_chunk_tokens
    rows = rows_a_chunk(
        torch.empty(0, hidden_size, dtype=torch.bfloat16 if size == 2 else torch.float32),
        torch.empty(vocab_size, 0),
        None if chunk == "auto" else chunk,
        logits_alive=num_models,
    )
    tokens = min(rows, recipe.batch.tokens_per_micro_batch)
    gradients = 4 * vocab_size * hidden_size * (1 + num_further_tokens(recipe))
    return num_models * tokens * vocab_size * size + gradients
