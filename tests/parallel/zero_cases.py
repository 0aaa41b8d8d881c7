"""What the tests of the ZeRO stages train, and the plain process they are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.site import EmbeddingSite, LinearSite
from leanmill.core.stage import Slot, Stage
from leanmill.parallel import config as configs
from leanmill.parallel.deepspeed import DeepSpeedEngine
from leanmill.parallel.engine import Preparation
from leanmill.parallel.tensors import assign, full


deepspeed = pytest.importorskip("deepspeed")
# What DeepSpeed imports late costs seconds: once here instead of once in every rank of every test.
pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
deepspeed.ops.__compatible_ops__  # noqa: B018

WORLD, MICRO, ROWS, LENGTH, VOCAB, HIDDEN, INNER = 2, 2, 3, 7, 61, 24, 35
MAX_NORM = 0.05
"""Far below the norms of the first steps, so that clipping always acts."""

Values = dict[str, Tensor]


class ScaledMask(Stage):
    """A stage with everything sharding can trip over: a trained (out, 1) scale and a frozen bool mask."""

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "scaled_mask"

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(out_features, 1, device="meta"))
        self.mask = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.bool, device="meta"), False)

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * self.mask * self.scale).to(weight.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = LinearSite.adopt(nn.Linear(HIDDEN, INNER), "up")
        self.down = LinearSite.adopt(nn.Linear(INNER, HIDDEN, bias=False), "down")

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))


class Model(nn.Module):
    """Tied embeddings, a buffer, biases, and shapes that no rank count divides."""

    def __init__(self, staged: bool) -> None:
        super().__init__()
        self.embed = EmbeddingSite.adopt(nn.Embedding(VOCAB, HIDDEN), "embed")
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.zeros(HIDDEN))
        for block in self.blocks if staged else []:
            block.up.put(ScaledMask(INNER, HIDDEN))
            block.down.put(ScaledMask(HIDDEN, INNER))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids) + self.offset
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Train(nn.Module):
    """A train module as the engines know it."""

    def __init__(self, staged: bool = True, freeze_base: bool = False) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Model(staged)
        for name, parameter in self.model.named_parameters():
            if freeze_base and "stages" not in name:
                parameter.requires_grad_(False)

    def forward(self, batch: Mapping[str, Tensor]) -> Values:
        logits = self.model(batch["input_ids"]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        return {"total": loss, "cross_entropy": loss}


def materialise(module: nn.Module) -> None:
    """Fill plain tensors and DTensors with values that depend on their names only."""
    for name, owner, key, tensor in _tensors(module):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        value = torch.randn(tensor.shape, generator=generator) * 0.2
        if tensor.dtype == torch.bool:
            value = value > -0.1
        elif "scale" in name or "norm.weight" in name:
            value = value + 1.0
        if tensor.is_meta:
            tensor = torch.empty_like(tensor, device="cpu")
            owner._buffers[key] = tensor
        assign(tensor, value.to(tensor.dtype))


@torch.no_grad()
def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for key, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{key}", owner, key, tensor.data if tensor.requires_grad else tensor


def micro_batch(step: int, rank: int, index: int) -> Values:
    """Rows whose number of targets differs from rank to rank and from micro-batch to micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + index)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : (3 * rank + 2 * index + step) % LENGTH] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def num_valid(step: int) -> Tensor:
    batches = [micro_batch(step, rank, index) for rank in range(WORLD) for index in range(MICRO)]
    return torch.tensor(float(sum((b["labels"] != -100).sum() for b in batches)))


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2, betas=(0.9, 0.95))


def reference(steps: int, max_norm: float | None, build: Callable[[], nn.Module] = Train) -> list[dict[str, Any]]:
    """Plain PyTorch on one process over the batches of all ranks."""
    module = build()
    fill_plain(module)
    optimizer = adamw(module)
    records = []
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(WORLD):
            for index in range(MICRO):
                (module(micro_batch(step, rank, index))["total"] / num_valid(step)).backward()
        trained = {n: p for n, p in module.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
        gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), math.inf if max_norm is None else max_norm)
        optimizer.step()
        weights = {n: p.detach().clone() for n, p in trained.items()}
        records.append({"gradients": gradients, "norm": norm, "weights": weights})
    return records


def fill_plain(module: nn.Module) -> None:
    shared: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                new = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                owner._parameters[key] = shared.setdefault(id(parameter), new)
    materialise(module)


def make_engine(
    stage: int,
    *,
    max_norm: float | None = MAX_NORM,
    precision: Any = "fp32",
    build: Callable[[], nn.Module] = Train,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    offload: str | None = None,
    path: str | None = None,
    fill: Callable[[nn.Module], None] = materialise,
) -> Any:
    place = None if offload is None else configs.DeepSpeedOffload(device=offload, path=path)  # type: ignore[arg-type]
    config = configs.DeepSpeedEngine(
        stage=stage,  # type: ignore[arg-type]
        offload_optimizer=place if stage > 0 else None,
        offload_parameters=place if stage == 3 else None,
    )
    # Nothing may stay gathered, or tiny models would not exercise ZeRO-3.
    engine = DeepSpeedEngine(config, device=torch.device("cpu"), precision=precision, persist_below=0)
    engine.prepare(
        build(),
        Preparation(materialise=fill, make_optimizer=optimizer, num_micro_batches=MICRO, max_grad_norm=max_norm),
    )
    return engine


def backward(engine: Any, step: int) -> Values:
    batches = [micro_batch(step, engine.data_rank, index) for index in range(MICRO)]
    return engine.forward_backward(batches, num_valid(step))  # type: ignore[no-any-return]


def train_step(engine: Any, step: int, max_norm: float | None = MAX_NORM) -> Tensor:
    backward(engine, step)
    norm = engine.clip(max_norm)
    engine.step(~torch.isfinite(norm))
    return norm  # type: ignore[no-any-return]


def trained_weights(engine: Any) -> Values:
    names = [n for n, p in engine.module.model.named_parameters() if p.requires_grad]
    return {name: engine.full_parameter(name) for name in names}


def snapshot(engine: Any) -> tuple[Values, Values]:
    """A copy of all state, as whole tensors."""
    model = {k: full(v).clone() for k, v in engine.model_state().items()}
    return model, {k: full(v).clone() for k, v in engine.optimizer_state().items()}


def assert_equal(left: Values, right: Values) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_close(left: Values, right: Values, **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def recorded(engine: Any, steps: int, max_norm: float | None) -> list[dict[str, Any]]:
    records = []
    for step in range(steps):
        backward(engine, step)
        gradients = {name: value.clone() for name, value in engine.gradients()}
        norm = engine.clip(max_norm)
        engine.step(~torch.isfinite(norm))
        records.append({"gradients": gradients, "norm": norm, "weights": trained_weights(engine)})
    return records


def assert_as_reference(
    got: Sequence[dict[str, Any]], want: Sequence[dict[str, Any]], rtol: float = 1e-4, atol: float = 2e-6
) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine["norm"], theirs["norm"], rtol=rtol, atol=atol)
        assert_close(mine["gradients"], theirs["gradients"], rtol=rtol, atol=atol)
        assert_close(mine["weights"], theirs["weights"], rtol=rtol, atol=1e-5)


def recorded_from(engine: Any, step: int, max_norm: float) -> list[dict[str, Any]]:
    backward(engine, step)
    gradients = {name: value.clone() for name, value in engine.gradients()}
    norm = engine.clip(max_norm)
    engine.step(~torch.isfinite(norm))
    return [{"gradients": gradients, "norm": norm, "weights": trained_weights(engine)}]
