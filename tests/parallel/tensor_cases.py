"""Tiny dense models with everything that ranks sharing matmuls could get wrong, trained from a recipe's own parts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from leanmill.core.technique import InstallContext, TechniqueConfig
from leanmill.core.transposed import as_linears
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from leanmill.optim.config import AdamW, OptimizerConfig
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import EngineConfig, LayoutConfig
from leanmill.parallel.engine import Engine, Preparation
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.parallel import cases
from tests.parallel.expert_cases import MAX_NORM, optimizer, train


VOCAB_SIZE = cases.VOCAB_SIZE + 1
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 5,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "olmo2": {},
    "phi3": {},
    "gemma2": {"head_dim": 8},
    "olmo": {},
    "phi": {"hidden_size": 32, "partial_rotary_factor": 0.5},
    "gpt2": {
        "n_embd": 24,
        "n_inner": 40,
        "n_layer": 2,
        "n_head": 4,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
    # The gradient of a bias of keys is zero, and its rounding another on every number of ranks.
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24, "dropout": 0.0, "enable_bias": False},
    "gptj": {"n_embd": 24, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "tie_word_embeddings": False},
    "stablelm": {"tie_word_embeddings": False},
    "persimmon": {"qk_layernorm": False, "hidden_size": 32, "tie_word_embeddings": False},
}
"""With biases; with norms inside heads; with norms across heads; with fused projections; with scaled embeddings; with
norms without weights; with attention and MLP side by side; and without a plan of their own: with queries, keys and
values one behind the other in a fused layer, an MLP in the block itself, counts of heads, and fused head by head."""


TECHNIQUES: dict[str, dict[str, Any]] = {
    "nm_sparsity": {"type": "nm_sparsity", "decay": 0.0},
    "ternary": {"type": "ternary"},
    "quest": {"type": "quest"},
    "lsq": {"type": "lsq", "weight_bits": 3},
    "lora": {"type": "lora", "rank": 4},
    "lora_branch": {"type": "lora", "rank": 4, "where": "branch"},
}
"""Without what a rule schedules over a run, which is for the tests that have one."""


def parsed(raw: dict[str, Any]) -> TechniqueConfig:
    (config,) = Recipe.model_validate(
        {"model": {"config": {"model_type": "llama"}}, "techniques": [raw], "train": {"steps": 3}}
    ).techniques
    return config


def _no_model(path: str) -> nn.Module:
    raise AssertionError(path)


def model_on_meta(dtype: torch.dtype = torch.float64, *, family: str = "llama", **sizes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES.get(family, {}), **sizes})
    with torch.device("meta"):
        return as_linears(AutoModelForCausalLM.from_config(config, dtype=dtype))


ADAMW = AdamW(lr=1e-2, weight_decay=0.1, eps=1e-3)
"""Its large eps keeps Adam from turning the rounding of gradients near zero into steps."""


def prepared(
    config: EngineConfig,
    *,
    optimizer_config: OptimizerConfig = ADAMW,
    layout: LayoutConfig | None = None,
    dtype: torch.dtype = torch.float64,
    num_micro_batches: int = 1,
    recompute: str = "none",
    technique: str = "none",
    family: str = "llama",
    compiles: bool = False,
    fused_loss: bool = False,
    **sizes: Any,
) -> Engine:
    engine, _ = build_engine(config, ranks=cases.ranks_here(), precision="fp32", model_bytes=0, layout=layout)
    model = model_on_meta(dtype, family=family, **sizes)
    module: nn.Module = TrainModule(model) if fused_loss else cases.SumLoss(model)
    if technique != "none":
        context = InstallContext(load_frozen_model=_no_model, vocab_size=VOCAB_SIZE)
        install_techniques([parsed(TECHNIQUES[technique])], model, context)
    apply_activation_checkpointing(model, recompute, keeps_received=False)  # type: ignore[arg-type]
    if compiles:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    materialise = make_materialiser(ModelConfig(config={"model_type": family}), seed=3)
    engine.prepare(
        module,
        Preparation(
            materialise=materialise,
            make_optimizer=partial(optimizer, config=optimizer_config),
            num_micro_batches=num_micro_batches,
            max_grad_norm=MAX_NORM,
        ),
    )
    return engine


def trained(config: EngineConfig, *, num_micro_batches: int = 1, **options: Any) -> dict[str, Any]:
    engine = prepared(config, num_micro_batches=num_micro_batches, **options)
    return {**train(engine, num_micro_batches=num_micro_batches), "data_rank": engine.data_rank}


tp_2 = partial(LayoutConfig, tp=2)
