"""A tiny model with everything that has broken engines before, and the data the parity tests train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.parallel.engine import Engine, Preparation
from leanmill.parallel.launch import Ranks


VOCAB_SIZE, SEQUENCE_LENGTH, NUM_MICRO_BATCHES, ROWS_PER_STEP = 67, 12, 2, 16


class SumLoss(nn.Module):
    """A train module in whatever precision its model has, fp64 included."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits = self.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cross_entropy = F.cross_entropy(logits, batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        return {"total": 1.0 * cross_entropy, "cross_entropy": cross_entropy}


class MaskedLinear(nn.Linear):
    """A frozen bool mask beside a trained weight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = kwargs.get("device")
        self.mask = nn.Parameter(torch.empty(self.weight.shape, dtype=torch.bool, device=device), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return F.linear(input, torch.where(self.mask, self.weight, 0.0), self.bias)


def make_module(dtype: torch.dtype = torch.float64, *, tied: bool = True) -> SumLoss:
    """Build the module on meta: tied embeddings, odd sizes, a mask, a frozen norm."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama",
        vocab_size=VOCAB_SIZE,
        hidden_size=36,
        intermediate_size=50,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for layer in model.model.layers:
            old = layer.mlp.down_proj
            layer.mlp.down_proj = MaskedLinear(old.in_features, old.out_features, bias=False, dtype=dtype)
    model.model.layers[1].input_layernorm.weight.requires_grad_(False)
    return SumLoss(model)


def materialise(module: nn.Module) -> None:
    """Fill every tensor from its name, on whatever it is sharded over."""
    made: dict[int, Tensor] = {}
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = _filled(f"{path}.{key}", parameter)
            owner._parameters[key] = made[id(parameter)]
        if "inv_freq" in owner._buffers:
            head_dim = 12
            value = 1.0 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
            owner._buffers["inv_freq"] = value
            owner._buffers["original_inv_freq"] = value.clone()


def _filled(name: str, parameter: nn.Parameter) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    if parameter.dtype == torch.bool:
        value = torch.rand(parameter.shape, generator=generator) > 0.4
    else:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1
        value = (noise + (1.0 if "norm" in name else 0.0)).to(parameter.dtype)
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return nn.Parameter(value, parameter.requires_grad)


def adamw(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, **{"foreach": True, **options})


def preparation(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw) -> Preparation:
    return Preparation(
        materialise=materialise,
        make_optimizer=make_optimizer,
        num_micro_batches=NUM_MICRO_BATCHES,
        max_grad_norm=None,
    )


def rows(step: int) -> dict[str, Tensor]:
    """The global batch of a step; rows have from 1 to 12 targets, so ranks differ."""
    generator = torch.Generator().manual_seed(step)
    shape = (ROWS_PER_STEP, SEQUENCE_LENGTH)
    labels = torch.randint(VOCAB_SIZE, shape, generator=generator)
    for row in range(ROWS_PER_STEP):
        labels[row, : (row * row + step) % SEQUENCE_LENGTH] = -100
    return {
        "input_ids": torch.randint(VOCAB_SIZE, shape, generator=generator),
        "labels": labels,
        "position_ids": torch.arange(SEQUENCE_LENGTH).expand(shape).contiguous(),
    }


def share_of(engine: Engine, step: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """This rank's micro-batches of a step, and the targets of the whole step."""
    batch = rows(step)
    num_valid = (batch["labels"] != -100).sum().float()
    size = ROWS_PER_STEP // engine.data_size
    mine = {name: value[engine.data_rank * size : (engine.data_rank + 1) * size] for name, value in batch.items()}
    parts = [{n: v.chunk(NUM_MICRO_BATCHES)[i] for n, v in mine.items()} for i in range(NUM_MICRO_BATCHES)]
    return parts, num_valid


def full_weights(engine: Engine) -> dict[str, Tensor]:
    return {name: engine.full_parameter(name) for name, _ in engine.module.model.named_parameters()}


def train(
    engine: Engine, *, num_steps: int = 3, max_norm: float | None = 0.4, first: int = 0
) -> dict[str, dict[str, Tensor] | list[float]]:
    """Train and return the last step's full gradients, all weights, and every step's norm and loss."""
    norms, losses, gradients = [], [], {}
    for step in range(first, first + num_steps):
        micro_batches, num_valid = share_of(engine, step)
        sums = engine.forward_backward(micro_batches, num_valid)
        gradients = {name: g.detach().clone() for name, g in engine.gradients()}
        norms.append(float(engine.clip(max_norm)))
        losses.append(float(sums["total"]))
        engine.step(torch.tensor(False))
    return {"gradients": gradients, "weights": full_weights(engine), "norms": norms, "losses": losses}


def ranks_here() -> Ranks:
    """This process's ranks inside `run_ranks`, or one process outside."""
    import torch.distributed as dist

    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Ranks(rank=rank, world_size=size, local_rank=rank, device=torch.device("cpu"))
