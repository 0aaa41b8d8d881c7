"""Tiny configs of every tested model family, with odd sizes where the family allows them."""

from __future__ import annotations

from typing import Any


_BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_BASE, "tie_word_embeddings": True},
    "qwen3": {**_BASE, "head_dim": 8},
    "qwen3_moe": {
        **_BASE,
        "head_dim": 8,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "mixtral": {**_BASE, "num_local_experts": 3, "num_experts_per_tok": 2},
    "olmoe": {**_BASE, "num_experts": 3, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        **_BASE,
        "moe_num_experts": 3,
        "moe_k": 2,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "pr_moe": {
        **_BASE,
        "head_dim": 8,
        "num_experts_by_layer": [2, 3],
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "residual_expert": True,
    },
    "deepseek_v2": {
        **_BASE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12,
        "v_head_dim": 10,
    },
    "deepseek_v3": {
        **_BASE,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """Return a fresh `model.config` mapping of `family`."""
    return {"model_type": family, **FAMILIES[family], **changes}


_ENCODER: dict[str, Any] = {"vocab_size": 97, "pad_token_id": 1}
_BERT = {**_ENCODER, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {**_BERT, "max_position_embeddings": 64},
    "roberta": {**_BERT, "max_position_embeddings": 66},
    "mpnet": {**_BERT, "max_position_embeddings": 66},
    # Of four layers, two look at 2 tokens on either side only.
    "modernbert": {**_BERT, "num_hidden_layers": 4, "max_position_embeddings": 64, "local_attention": 4},
    "distilbert": {
        **_ENCODER,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 64,
    },
}
"""Encoders, built with `model.task: masked_lm`."""


def tiny_encoder(family: str) -> dict[str, Any]:
    """Return `model.config` of an encoder."""
    return {"model_type": family, **ENCODERS[family]}
