"""A tiny mixture of experts, and training it from a recipe's own parts: model, materialising, optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from leanmill.optim.build import build_optimizer
from leanmill.optim.config import AdamW, OptimizerConfig
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import EngineConfig, LayoutConfig
from leanmill.parallel.engine import Engine, Preparation
from tests.parallel import cases


NUM_EXPERTS, ROWS = 8, 24
MAX_NORM = 0.1
"""Below the norm of every step, so that clipping shows."""


_SIZES: dict[str, Any] = {
    "vocab_size": cases.VOCAB_SIZE,
    "hidden_size": 24,
    "intermediate_size": 32,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_key_value_heads": 1, "head_dim": 8, "decoder_sparse_step": 1},
    "qwen2_moe": {"num_key_value_heads": 1, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 20},
    "deepseek_v3": {
        "num_key_value_heads": 3,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 10,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 8,
    },
}
"""The others have shared experts, called before the routed ones, or after."""


def model_on_meta(
    dtype: torch.dtype = torch.float64, *, num_experts: int = NUM_EXPERTS, family: str = "qwen3_moe"
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    key = "n_routed_experts" if family == "deepseek_v3" else "num_experts"
    config = AutoConfig.for_model(family, **_SIZES, **FAMILIES[family], **{key: num_experts})
    with torch.device("meta"):
        # Transformers' other ways of computing experts take no fp64.
        return AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")


def prepared(
    config: EngineConfig,
    *,
    ep: int = 1,
    dtype: torch.dtype = torch.float64,
    precision: str = "fp32",
    num_micro_batches: int = 1,
    recompute: str = "none",
    max_norm: float | None = MAX_NORM,
    install: Callable[[Any], object] = lambda model: None,
    num_experts: int = NUM_EXPERTS,
    family: str = "qwen3_moe",
    compiles: bool = False,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    **exchange: Any,
) -> Engine:
    layout = LayoutConfig(ep=ep, **exchange)
    engine, _ = build_engine(config, ranks=cases.ranks_here(), precision=precision, model_bytes=0, layout=layout)  # type: ignore[arg-type]
    module = cases.SumLoss(model_on_meta(dtype, num_experts=num_experts, family=family))
    install(module.model)
    keeps_received = layout.tokens_travel and not layout.expert_resend
    apply_activation_checkpointing(module.model, recompute, keeps_received=keeps_received)  # type: ignore[arg-type]
    if compiles:
        for layer in module.model.model.layers:
            layer.compile(backend="aot_eager")
    engine.prepare(
        module,
        Preparation(
            materialise=materialise(),
            make_optimizer=make_optimizer or optimizer,
            num_micro_batches=num_micro_batches,
            max_grad_norm=max_norm,
        ),
    )
    return engine


def materialise() -> Callable[[nn.Module], None]:
    return make_materialiser(ModelConfig(config={"model_type": "qwen3_moe"}), seed=3)


def optimizer(module: nn.Module, config: OptimizerConfig | None = None) -> torch.optim.Optimizer:
    config = config or AdamW(lr=1e-2, weight_decay=0.1)
    named = [(name, p) for name, p in module.model.named_parameters() if p.requires_grad]
    return build_optimizer(config, named)


def share_of(engine: Engine, step: int, num_micro_batches: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """This rank's micro-batches and the targets of all; ranks have unequal ones, and one rank repeats a token."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(cases.VOCAB_SIZE, (ROWS, cases.SEQUENCE_LENGTH), generator=generator)
    ids[: ROWS // 4] = 5  # all to the same experts
    labels = ids.roll(-1, 1)
    for row in range(ROWS):
        labels[row, : (row * row + step) % cases.SEQUENCE_LENGTH] = -100
    positions = torch.arange(cases.SEQUENCE_LENGTH).expand(ids.shape)
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
    size = ROWS // engine.data_size
    mine = {name: value[engine.data_rank * size : (engine.data_rank + 1) * size] for name, value in batch.items()}
    parts = [{n: v.chunk(num_micro_batches)[i] for n, v in mine.items()} for i in range(num_micro_batches)]
    return parts, (labels != -100).sum().float()


def train(
    engine: Engine,
    *,
    num_micro_batches: int = 1,
    num_steps: int = 3,
    first: int = 0,
    max_norm: float | None = MAX_NORM,
    before_step: Callable[[Engine, int], object] = lambda engine, step: None,
) -> dict[str, Any]:
    norms, losses, gradients = [], [], {}
    for step in range(first, first + num_steps):
        micro_batches, num_valid = share_of(engine, step, num_micro_batches)
        before_step(engine, step)
        sums = engine.forward_backward(micro_batches, num_valid)
        gradients = {name: g.detach().clone() for name, g in engine.gradients()}
        norms.append(float(engine.clip(max_norm)))
        losses.append(float(sums["total"]))
        engine.step(torch.tensor(False))
    return {"gradients": gradients, "weights": cases.full_weights(engine), "norms": norms, "losses": losses}
