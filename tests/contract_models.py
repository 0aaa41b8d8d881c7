"""The tiny models that the contract test trains, by the name that a combination gives them."""

from __future__ import annotations

from typing import Any


VOCAB_SIZE, SEQUENCE_LENGTH, NUM_ROWS, NUM_STEPS = 61, 16, 8, 3
MODEL = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": MODEL
    | {
        "model_type": "mixtral",
        "intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "pr_moe": MODEL
    | {
        "model_type": "pr_moe",
        "num_experts_by_layer": [2, 4],
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 24,
        "head_dim": 16,
        "residual_expert": True,
    },
    "linear_llama": MODEL
    | {
        "model_type": "linear_llama",
        "head_dim": 16,
        "sliding_window": 4,
        "feature_dim": 6,
    },
    "latent_llama": MODEL
    | {
        "model_type": "latent_llama",
        "head_dim": 16,
        "kv_lora_rank": 12,
        "rope_head_dim": 6,
    },
    "pruned_llama": MODEL
    | {
        "model_type": "pruned_llama",
        "head_dim": 8,
        "num_hidden_layers": 3,
        "num_attention_heads_by_layer": [4, 0, 2],
        "num_key_value_heads_by_layer": [2, 0, 2],
        "intermediate_size_by_layer": [24, 40, 0],
        "linear_attention_by_layer": [False, True, False],
        "linear_mlp_by_layer": [False, False, True],
        "qk_norm": True,
        "residual_rotations": True,
        "rank_by_linear": {"self_attn.q_proj": [4, 0, 0], "mlp.up_proj": [0, 8, 0]},
    },
    "folded_llama": MODEL
    | {
        "model_type": "folded_llama",
        "head_dim": 16,
        "num_hidden_layers": 3,
        "num_layers_by_block": [2, 1],
        "qk_norm": True,
        "adapter_rank": 4,
    },
    "ernie4_5_moe": MODEL
    | {
        "model_type": "ernie4_5_moe",
        "moe_num_experts": 7,
        "moe_k": 3,
        "moe_intermediate_size": 12,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
    },
    "deepseek_v3": MODEL
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "tie_word_embeddings": False,
    },
    # Exits of the first and of the last block count nothing.
    "deeper": MODEL | {"num_hidden_layers": 4},
}
"""Other models; a combination that names one trains it."""

ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {key: value for key, value in MODEL.items() if key not in ("model_type", "num_key_value_heads")}
    | {"model_type": "bert", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
}
"""Encoders, which learn from tokens that are hidden from them."""
