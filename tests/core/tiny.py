"""Tiny models of every covered family, and an install context, for tests of sites and techniques."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from leanmill.core.registry import parse_technique
from leanmill.core.technique import InstallContext


VOCAB_SIZE = 61
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {"head_dim": 16, **_EXPERTS},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 1,
        "head_dim": 16,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "rotary_dim": 8},
    "deepseek_v2": {
        "num_key_value_heads": 2,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 4.0,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
    },
    "deepseek_v3": {
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
    },
}
MIXTURES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3")
WITH_EXPERTS = (*MIXTURES, "ernie4_5_moe", "minimax_m2")
"""With those whose bias on the choice of experts lies elsewhere."""


def tiny(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A causal LM with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" not in name:
                parameter.normal_()  # biases and gates that start at zero would hide mistakes
    return model


def context(teacher: nn.Module | None = None, **changes: Any) -> InstallContext:
    """What a trainer would offer; the teacher, if any, is what every name loads."""

    def load(path: str) -> nn.Module:
        assert teacher is not None, f"nobody should load {path}"
        return teacher.eval().requires_grad_(False)

    if teacher is not None:
        changes = {"frozen_config": lambda path: teacher.config, **changes}
    return InstallContext(**{"load_frozen_model": load, "vocab_size": VOCAB_SIZE, "seed": 0, **changes})


def install(model: nn.Module, *raw: dict[str, Any], teacher: nn.Module | None = None) -> Any:
    """Install techniques given as in a recipe."""
    from leanmill.trainer.prepare import install_techniques

    return install_techniques([parse_technique(one) for one in raw], model, context(teacher))


def term_of(config: Any, offered: InstallContext) -> Any:
    """The loss term that a technique without stages installs."""
    return config.install(None, offered).loss_terms[0]


def tokens(num_rows: int = 2, length: int = 13, *, seed: int = 1) -> torch.Tensor:
    """Random token ids [num_rows, length]."""
    return torch.randint(VOCAB_SIZE, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy."""
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
