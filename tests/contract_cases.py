"""What the contract test trains: tiny model, every technique and combination, every engine.

A new technique adds one line to `TECHNIQUES` and, where it promises something of the weights, one to `PROMISES` in
`tests.contract_promises`.
"""

from __future__ import annotations

from typing import Any


FROZEN_DTYPES = ("bf16", "int8", "int4", "int2", "nf4", "nf3")
"""How frozen weights are kept; a combination that names one sets `model.frozen_dtype`."""

TECHNIQUES: dict[str, dict[str, Any]] = {
    "nm_sparsity": {"type": "nm_sparsity", "num_kept": 2, "group_size": 4, "gradient": "sr_ste", "decay": 1e-2},
    "ternary": {"type": "ternary"},
    "lora": {"type": "lora", "rank": 4, "alpha": 8},
    "lora_branch": {"type": "lora", "rank": 4, "alpha": 8, "where": "branch"},
    "distill": {"type": "distill", "teacher": "TEACHER", "weight": 0.5},
    "quest": {"type": "quest", "weight_bits": 4, "activation_bits": 4},
    "bdwp": {"type": "bdwp", "num_kept": 2, "group_size": 4},
}
"""One of every slot and kind; all pairs of them are trained."""

EXTRA_TECHNIQUES: dict[str, dict[str, Any]] = {
    "nm_sparsity_tied": TECHNIQUES["nm_sparsity"] | {"targets": ["*_proj", "embed_tokens", "lm_head"]},
    # A dense step, one under a soft mask, and one under the plain one.
    "progressive": {
        "type": "nm_sparsity",
        "progressive": {"decay": "exponential", "rate": 2.0, "fine_tune_share": 0.0},
    },
    "stepwise": {"type": "nm_sparsity", "progressive": {"decay": "stepwise", "fine_tune_share": 0.0}},
    "transposable": {"type": "nm_sparsity", "transposable": True, "decay": 1e-2},
    "pulled": {"type": "nm_sparsity", "transposable": True, "decay": 0.1, "decay_on": "update", "log_flips": True},
    "pulled_aside": {
        "type": "nm_sparsity",
        "decay": 0.5,
        "decay_on": "weight",
        "decay_warmup": 0.5,
        "dense_at_end": 0.1,
    },
    "distill_reverse": TECHNIQUES["distill"] | {"divergence": "reverse_kl", "weight": 0.25},
    "sinkhorn_of_two": TECHNIQUES["distill"]
    | {
        "teacher": ["TEACHER", "TEACHER/pruned"],
        "teacher_weights": [2.0, 1.0],
        "divergence": "sinkhorn",
        "batch_tokens": 8,
    },
    "on_policy": {"type": "on_policy", "share": 0.6, "prompt_tokens": 5, "new_tokens": 4},
    "ternary_int8": {"type": "ternary", "activation_bits": 8},
    # At temperatures like the paper's last, scores of tiny logits would all be ties but for rounding.
    "mask_llm": {"type": "mask_llm", "temperature": [4.0, 1.0], "scale": [100.0, 200.0]},
    "drawn_mask": {
        "type": "mask_llm",
        "sampler": "draws",
        "num_kept": 4,
        "group_size": 8,
        "temperature": [4.0, 1.0],
        "scale": [100.0, 200.0],
    },
    "mask_llm_tied": {
        "type": "mask_llm",
        "targets": ["*_proj", "embed_tokens", "lm_head"],
        "temperature": [4.0, 1.0],
        "weight_regularisation": 1e-2,
    },
    "int_quant": {"type": "int_quant", "weight_bits": 4, "activation_bits": 8, "granularity": "group", "group_size": 8},
    # Eight bits in the first step, four in the second.
    "falling_bits": {
        "type": "int_quant",
        "weight_bits": 2,
        "bits_schedule": [{"bits": 8, "until": 1}, {"bits": 4, "until": 2}],
        "bits_per_layer": {"up_proj": 3},
    },
    "widths_in_turn": {"type": "int_quant", "weight_bits": 4, "switch_bits": [8, 4, 2], "granularity": "tensor"},
    "fp_quant": {"type": "fp_quant", "weight_format": "nvfp4"},
    # Of few layers, as `lsq_activations` below.
    "best_fp4": {
        "type": "fp_quant",
        "weight_format": "fp4",
        "scale": "power_of_two",
        "activation_format": "mxfp8_e4m3",
        "targets": ["o_proj", "up_proj"],
    },
    "fp8_gradients": {
        "type": "fp_quant",
        "weight_format": "e8m10",
        "gradient_format": "e5m2",
        "targets": ["o_proj", "up_proj"],
    },
    "fp_quant_scaled": {"type": "fp_quant", "weight_format": "e3m2", "granularity": "tensor"},
    "lsq_tensor": {"type": "lsq", "weight_bits": 4},
    "lsq_row": {"type": "lsq", "weight_bits": 3, "granularity": "row"},
    "lsq_tied": {"type": "lsq", "granularity": "row", "targets": ["*_proj", "embed_tokens", "lm_head"]},
    "rho1": {"type": "rho1", "reference": "TEACHER", "kept_share": 0.5, "warmup_share": 0.2},
    # Of few layers: where a value lies next to the edge of a code, another order of additions rounds it otherwise.
    "lsq_activations": {
        "type": "lsq",
        "weight_bits": 4,
        "granularity": "row",
        "activation_bits": 4,
        "targets": ["o_proj", "up_proj"],
    },
    # Everything of BitNet, after a step in full precision and one half-way.
    "bitnet": {"type": "ternary", "activation_bits": 8, "input_norm": True, "warmup_steps": 2},
    "binary": {"type": "binary"},
    "dual_binary": {"type": "dual_binary", "granularity": "group", "group_size": 8},
    "dual_tensor": {"type": "dual_binary", "granularity": "tensor", "warmup_steps": 1},
    # Two bases in the first step, then one.
    "two_bases": {"type": "binary", "num_bases": 2, "bases_until": 1},
    "salient_signs": {"type": "binary", "granularity": "row", "center": False, "salient": 0.1},
    "wave": {"type": "binary", "center": False, "frequency": 20.0, "warmup_steps": 2},
    "paretoq": {"type": "paretoq", "weight_bits": 1.58},
    "elastic_signs": {"type": "paretoq", "weight_bits": 1},
    "lsq_plus": {
        "type": "lsq",
        "weight_bits": 4,
        "weight_start": "lsq_plus",
        "activation_bits": 4,
        "activation_offset": True,
        "targets": ["o_proj", "down_proj"],
    },
    # Codes move in the second step and in the third.
    "pv_tuning": {"type": "pv_tuning", "weight_bits": 3, "group_size": 8, "max_change": 0.1, "trust_ratio": 0.1},
    "codebook": {"type": "pv_tuning", "weight_bits": 2, "levels": "codebook", "accumulate": False, "max_change": 0.1},
    "stochastic_depth": {"type": "stochastic_depth", "rate": 0.5, "over_layers": "linear"},
    "dropped_steps": {"type": "stochastic_depth", "rate": 0.6, "over_layers": "uniform", "granularity": "batch"},
    "layernorm_scaling": {"type": "layernorm_scaling"},
    "neftune": {"type": "neftune", "alpha": 20.0},
    "layer_metrics": {"type": "layer_metrics"},
    "gamma_mod": {"type": "mixture_of_depths", "layers": [1, 2], "router_loss_weight": 0.1},
    "router_tuning": {"type": "router_tuning", "num_layers": 2, "target_capacity": 0.3, "capacity_weight": 0.1},
    "stgc": {"type": "stgc", "weight": 0.5},
    "chosen": {"type": "mixture_of_depths", "layers": [0, 1], "capacity": 0.4},
    "p_mod": {"type": "mixture_of_depths", "method": "p_mod"},
    "protected": {"type": "mixture_of_depths", "layers": [0, 1], "protect": "labels", "shared_router": False},
    "layer_skip": {
        "type": "stochastic_depth",
        "rate": 0.5,
        "over_time": "exponential",
        "early_exit": {"scale": 1.0, "rotation": 2},
    },
    "quest_weights": TECHNIQUES["quest"] | {"activation_bits": None},
    "hidden_distill": {"type": "hidden_distill", "teacher": "TEACHER", "loss": "normalised_mse", "weight": 0.5},
    "relation_distill": {"type": "relation_distill", "teacher": "TEACHER", "weight": 0.5},
    "multi_token": {"type": "multi_token", "depth": 2, "weight": 0.5, "late_weight": 0.2},
    "router_balance": {"type": "router_balance", "weight": 0.5, "z_weight": 0.1},
    "router": {"type": "router", "jitter": 0.05, "capacity_factor": 0.75, "capacity_over": "sequence"},
    "expert_choice": {"type": "router", "expert_choice": {"experts_a_token": 1.5}},
    "balance_ahead": {"type": "router_balance", "weight": 0.5, "z_weight": 0.1, "estimator": "two_pass"},
    "balance_rows": {"type": "router_balance", "weight": 0.5, "z_weight": 0.1, "scope": "sequence"},
    "bias_balance": {"type": "bias_balance", "rate": 0.01},
    "moe_metrics": {"type": "moe_metrics"},
    "sharpness": {"type": "sharpness"},
    # Masks move in the second step, and the third trains what has grown; `set` moves them in both.
    "rigl": {"type": "rigl", "density": 0.4, "update_every_steps": 1, "drop_fraction": 0.5, "update_until": 0.6},
    "set": {"type": "rigl", "method": "set", "density": 0.4, "update_every_steps": 1, "update_until": 1.0},
    "sparsity_moves": {
        "type": "rigl",
        "density": 0.4,
        "update_every_steps": 1,
        "drop_fraction": 0.5,
        "update_until": 0.6,
        "scope": "global",
    },
    "rigl_at_rest": {"type": "rigl", "density": 0.4, "drop_fraction": 0.0},
    "gradual_pruning": {
        "type": "gradual_pruning",
        "sparsity": 0.6,
        "initial_sparsity": 0.2,
        "end": 0.5,
        "update_every_steps": 1,
        "scope": "global",
    },
    "pruned_blocks": {
        "type": "gradual_pruning",
        "sparsity": 0.5,
        "end": 0.5,
        "update_every_steps": 1,
        "pattern": "block",
        "block_shape": [4, 2],
        "criterion": "gradient",
    },
    # Drawn in the second step; the third trains what is left.
    "early_ticket": {
        "type": "early_ticket",
        "scope": "global",
        "compare_every_steps": 1,
        "num_masks": 2,
        "tolerance": 1.0,
        "latest": 0.9,
    },
    # Half of the neurons; the model has one key-value head a layer, which stays.
    "lora_prune": {
        "type": "lora_prune",
        "begin": 0.0,
        "end": 0.5,
        "update_every_steps": 1,
        "spared_last": 0,
    },
    # About a third is pruned in the end.
    "learned_threshold": {"type": "learned_threshold", "push": 0.1, "lr_factor": 0.3},
    "thresholds_in_a_budget": {
        "type": "learned_threshold",
        "push": 0.1,
        "lr_factor": 0.3,
        "share": "matrix",
        "sparsity": 0.3,
    },
    "pruned_by_movement": {
        "type": "gradual_pruning",
        "sparsity": 0.5,
        "end": 0.5,
        "update_every_steps": 1,
        "scope": "global",
        "criterion": "movement",
    },
    "pruned_by_curvature": {
        "type": "gradual_pruning",
        "sparsity": 0.5,
        "initial_sparsity": 0.2,
        "end": 0.5,
        "update_every_steps": 1,
        "scope": "global",
        "criterion": "mfac",
        "mfac_gradients": 2,
        "mfac_block_size": 10,
        "mfac_damping": 1.0,
    },
    "pruned_columns": {
        "type": "gradual_pruning",
        "sparsity": 0.5,
        "end": 0.5,
        "update_every_steps": 1,
        "pattern": "column",
        "criterion": "fisher",
        "growth": "geometric",
    },
    "second_lora": {
        "type": "lora",
        "rank": 2,
        "alpha": 4,
        "targets": ["q_proj", "down_proj"],
        "lr_factor": 2.0,
        "weight_decay": 0.5,
    },
    "peft_vera": {"type": "peft", "method": "vera", "r": 4},
    "peft_pool": {"type": "peft", "method": "vblora", "vector_length": 8, "num_vectors": 8, "targets": ["q_proj"]},
    "peft_routed": {
        "type": "peft",
        "method": "moe_lora",
        "r": 1,
        "num_experts": 4,
        "top_k": 2,
        "balance": "bias",
        "bias_rate": 0.01,
    },
    "peft_bottleneck": {"type": "peft", "method": "bottleneck", "r": 4},
    "ba_lora": {
        "type": "ba_lora",
        "reference": "TEACHER",
        "consistency": 0.5,
        "diversity": 0.3,
        "singular_values": 0.3,
        "group_tokens": 8,
    },
    # Two layers are given a rank after each of the first two steps.
    "peft_ranks": {
        "type": "peft",
        "method": "rank_lora",
        "r": 4,
        "target_r": 1.25,
        "grow_layers": 2,
        "grow_every": 1,
        "grow_after": 0,
    },
    "peft_nested": {"type": "peft", "method": "rank_lora", "variant": "dylora", "r": 4, "used_r": 2},
    "lisa": {"type": "lisa", "num_layers": 1, "every_steps": 1},
    "peqa": {"type": "peqa", "bits": 4, "group_size": 8, "lr_factor": 0.1},
    "peqa_rows": {"type": "peqa", "bits": 2, "lr_factor": 0.1},
    # Subspaces are found in the first step and in the third.
    "galore": {"type": "galore", "rank": 4, "every_steps": 2, "scale": 0.5},
    "natural_galore": {
        "type": "galore",
        "rank": 4,
        "every_steps": 1,
        "subspace": "sketch",
        "natural": {"history": 2, "damping": 0.1},
    },
    "drawn_subspaces": {"type": "galore", "rank": 4, "every_steps": 2, "subspace": "random"},
    "welore": {"type": "welore"},
    "side_unipt": {"type": "side_network", "size": 12, "keeps_base": False},
    "side_sherl": {"type": "side_network", "method": "sherl", "size": 12, "keeps_base": False},
    "static_mask": {"type": "static_mask"},
    "perp": {"type": "perp", "train": ["biases", "norms"]},
    # No sub-model has the other half of the neurons.
    "matformer": {"type": "matformer", "granularities": [2, 4]},
    "matformer_sum": {"type": "matformer", "mode": "sum", "granularities": [1, 4]},
}
"""Variants and further tenants of a slot."""

OF_PRUNED = {"static_mask", "perp", "nf4", "nf3"}
"""What starts from zeros: trained on a pruned model, with biases. Codes of a stored model are made part by part."""

CHUNK_TOKENS = 24

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"type": "ddp"},
    "fsdp": {"type": "fsdp"},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3},
}


WITH_REPRESENTATIVES = {"ddp", "zero1", "zero2", "zero3"}
"""Engines that train `ON_EVERY_ENGINE` only with the fast tests; FSDP2 trains all."""
ON_EVERY_ENGINE = {
    "none",
    *TECHNIQUES,
    "mask_llm",
    "rigl",
    "gradual_pruning",
    "pv_tuning",
    "galore",
    "layer_skip",
    "hidden_distill",
    "experts",
    "masked experts",
    "biased experts",
    "experts, looked ahead",
    "learned_mask",
    "turns",
    "two_loras",
    "mask_lora",
    "masked by adapters",
    "lsq_activations",
    "masked tokens",
    "two teachers, head in chunks",
    "all",
    # In bf16.
    "nm_sparsity+ternary+lora",
    "tied",
    "lsq_row",
    "rigl_at_rest",
    "routed experts",
}
"""One of each way in which a technique meets an engine: its parameters, rules, views, losses, forwards of its own."""


def is_refused(engine: dict[str, Any], names: tuple[str, ...]) -> bool:
    """Whether a recipe with this engine and these techniques is refused when it is read."""
    return engine["type"] == "deepspeed" and "lisa" in names


def is_fast(engine_name: str, combination: str) -> bool:
    """Whether this cell of `COMBINATIONS` or `BF16_COMBINATIONS` is of `make test`; the others are slow tests."""
    return engine_name not in WITH_REPRESENTATIVES or combination in ON_EVERY_ENGINE


def cells(combinations: dict[str, tuple[str, ...]], *, fast: bool = True) -> list[tuple[str, str]]:
    """Every (engine, combination) on several ranks that can be trained, of the fast tests or of the slow ones."""
    return [
        (engine_name, key)
        for engine_name, engine in ENGINES.items()
        for key, names in combinations.items()
        if not is_refused(engine, names) and is_fast(engine_name, key) == fast
    ]


def of_engine(
    engine_name: str, combinations: dict[str, tuple[str, ...]], *, fast: bool = True
) -> dict[str, tuple[str, ...]]:
    """Those of the combinations that `cells` has of an engine."""
    return {key: combinations[key] for name, key in cells(combinations, fast=fast) if name == engine_name}
