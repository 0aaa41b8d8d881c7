"""Every method of PEFT that trains here, at sizes for a tiny model."""

from __future__ import annotations

from typing import Any


OPTIONS: dict[str, dict[str, Any]] = {
    "boft": {"boft_block_size": 4},
    "bottleneck": {"r": 4},
    "c3a": {"block_size": 8},
    "core_lora": {"r": 4},
    "deft": {"r": 4},
    "fourierft": {"n_frequency": 10},
    "glora": {"r": 4},
    "gralora": {"r": 4},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "lily": {"r": 4},
    "miss": {"r": 4},
    "moe_lora": {"r": 2, "num_experts": 3},
    "mos": {"r": 4},
    "nola": {"r": 4, "num_basis": 8},
    "oft": {"oft_block_size": 8},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 4},
    "randlora": {"r": 4},
    # Four of twelve ranks that are given in the first two of three steps.
    "rank_lora": {"r": 4, "target_r": 1.7, "grow_layers": 2, "grow_every": 1, "grow_after": 0},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "supertuning": {"sparsity": 0.9},
    "trainable_tokens": {"token_indices": [1, 5, 9]},
    "vblora": {"vector_length": 8, "num_vectors": 8},
    "vera": {"r": 4},
    "waveft": {"n_frequency": 10},
}


def raw_of(method: str, **options: Any) -> dict[str, Any]:
    """A recipe's line for a method."""
    targets = {} if method in ("ln_tuning", "trainable_tokens") else {"targets": ["q_proj", "v_proj", "down_proj"]}
    return {"type": "peft", "method": method, **targets, **OPTIONS.get(method, {}), **options}
