"""A run that never trained, told through the observers as a real one would tell it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.site import LinearSite
from leanmill.core.stage import Slot, Stage
from leanmill.core.technique import TechniqueConfig
from leanmill.parallel.layout import Layout
from leanmill.recipe.root import Recipe
from leanmill.recipe.sections import LogConfig
from leanmill.report.observer import DomainScore, EvalRecord, Observer, RunInfo, StepRecord


class FakeTechnique(TechniqueConfig):
    type: Literal["nm_sparsity", "ternary"]


class TwoOfFour(Stage):
    slot, technique = Slot.MASK, "nm_sparsity"

    def forward(self, weight: Tensor) -> Tensor:
        groups = weight.reshape(-1, 4)
        kept = groups.abs().argsort(dim=-1, descending=True)[:, :2]
        return (groups * torch.zeros_like(groups).scatter_(1, kept, 1.0)).reshape(weight.shape)


class LearnedScale(nn.Module):
    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((num_rows, 1), 0.5))


class TernaryWithScale(Stage):
    slot, technique = Slot.QUANT, "ternary"

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.learned = LearnedScale(num_rows)
        self.register_buffer("strength", torch.ones(1), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        ternary = weight.sign() * (weight.abs() > 0.02)
        return self.strength * self.learned.scale * ternary


class FakeEngine:
    """As much of an engine as observers ask for, on one process."""

    name = "single"
    device = torch.device("cpu")
    layout = Layout(1)

    def __init__(self, model: nn.Module) -> None:
        self.module = nn.Module()
        self.module.model = model
        self.asked: list[str] = []

    def full_parameter(self, name: str) -> Tensor:
        self.asked.append(name)
        return self.module.model.get_parameter(name)


def tiny_model(num_layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Module() for _ in range(num_layers))
    for index, layer in enumerate(model.layers):
        for leaf, (rows, columns) in {"q_proj": (24, 32), "down_proj": (32, 48)}.items():
            linear = nn.Linear(columns, rows, bias=False)
            nn.init.normal_(linear.weight, std=0.05)
            site = LinearSite.adopt(linear, f"model.layers.{index}.{leaf}")
            site.put(TwoOfFour())
            if leaf == "down_proj":
                site.put(TernaryWithScale(rows))
            setattr(layer, leaf, site)
    root = nn.Module()
    root.model = model
    return root


def fake_recipe(
    run_dir: Path, name: str = "fake", techniques: Sequence[str] = ("nm_sparsity", "ternary"), **log: Any
) -> Recipe:
    return Recipe(
        name=name,
        run_dir=str(run_dir),
        seed=7,
        model={"config": {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32}},
        train={"steps": 400, "precision": "fp32"},
        techniques=[FakeTechnique(type=t) for t in techniques],
        log=LogConfig(**{"tensorboard": False, **log}),
    )


def fake_info(recipe: Recipe, run_dir: Path, *, start_step: int = 0, num_steps: int = 400, **changes: Any) -> RunInfo:
    fields: dict[str, Any] = {
        "recipe": recipe,
        "run_dir": run_dir,
        "engine": FakeEngine(tiny_model()),
        "rank": 0,
        "world_size": 2,
        "num_steps": num_steps,
        "start_step": start_step,
        "num_parameters": 5_243_136,
        "num_trainable": 5_243_136,
        "flops_per_token": 3.4e7,
        "notes": (
            "engine single: one process, no sharding needed",
            "converted 4 of 4 linear weights; left plain: none",
        ),
    }
    return RunInfo(**{**fields, **changes})


def fake_step(step: int, num_steps: int = 400, *, skipped: int = 0, **changes: Any) -> StepRecord:
    noise = random.Random(step)
    loss = 1.9 + 7.1 * math.exp(-step / 45) + noise.gauss(0, 0.06)
    distill = 0.4 + math.exp(-step / 60) + noise.gauss(0, 0.02)
    warmup = min(1.0, step / 20)
    seconds = 1.4 * (1 + abs(noise.gauss(0, 0.04)))
    fields: dict[str, Any] = {
        "step": step,
        "tokens": step * 32_768,
        "losses": {"total": loss + distill, "cross_entropy": loss, "distill": distill},
        "grad_norm": 0.5 + 20 * math.exp(-step / 25) * (1 + noise.random()) + noise.random() * 0.2,
        "lr": 3e-3 * warmup * (0.1 + 0.45 * (1 + math.cos(math.pi * step / num_steps))),
        "step_seconds": seconds,
        "tokens_per_second": 32_768 / seconds,
        "peak_memory_bytes": int(1.6e9 + 1e6 * min(step, 40)),
        "skipped_steps": skipped,
        "metrics": {"rigl/num_moved": 300.0 * math.exp(-step / 100)},
    }
    return StepRecord(**{**fields, **changes})


def fake_eval(step: int) -> EvalRecord:
    decline = math.exp(-step / 120)
    domains = {}
    for index, (name, order0) in enumerate({"python": 4.71, "cpp": 4.9, "english": 4.6}.items()):
        loss = 1.8 + 0.25 * index + 3.0 * decline
        domains[name] = DomainScore(
            loss=loss,
            perplexity=math.exp(loss),
            bits_per_byte=0.55 * loss,
            order0_bits_per_byte=order0,
            num_tokens=65_536,
        )
    loss = sum(d.loss for d in domains.values()) / 3
    domains["all"] = DomainScore(
        loss=loss, perplexity=math.exp(loss), bits_per_byte=0.55 * loss, order0_bits_per_byte=4.74, num_tokens=196_608
    )
    return EvalRecord(step=step, tokens=step * 32_768, domains=domains)


def fake_experts(step: int, num_layers: int = 4, num_experts: int = 8) -> dict[str, Any]:
    """Tokens by domain, layer and expert: uneven, ever more so, and one expert that gets none."""
    noise = random.Random(7)
    domains = {}
    for name in ("python", "cpp", "english"):
        layers = [[noise.gauss(0, 0.2 + step / 400) for _ in range(num_experts)] for _ in range(num_layers)]
        domains[name] = [[round(4096 * math.exp(value)) for value in layer] for layer in layers]
        domains[name][-1][-1] = 0
    return {"layers": list(range(1, num_layers + 1)), "domains": domains}


def with_experts(record: StepRecord | EvalRecord) -> StepRecord | EvalRecord:
    """The record as a mixture of experts would give it."""
    growth = record.step / 400
    if isinstance(record, EvalRecord):
        metrics = {
            "experts/specialisation": 0.3 * growth,
            **{f"experts/specialisation/{i}": 0.1 * i * growth for i in range(1, 5)},
        }
        return replace(record, tables={"experts": fake_experts(record.step)}, metrics=metrics)
    by_layer = {f"experts/max_violation/{i}": 3 / (i + 10 * growth) for i in range(1, 5)}
    return replace(record, metrics={"experts/max_violation": 1.5 / (1 + 10 * growth), **by_layer})


def fake_study(step: int) -> dict[str, Any]:
    """What a study of the routing of the mixture would write."""
    stretches = {factor: [max(0.0, (i / 16 - 0.5) / float(factor)) for i in range(16)] for factor in ("1.0", "2.0")}
    dependence = {
        "token": [0.7, 0.5, 0.4, None],
        "previous_token": [0.02, 0.1, 0.2, None],
        "position": [0.0, 0.01, 0.0, None],
        "agreement": [0.9, 0.8, 0.7, None],
        "agreement_by_chance": [0.2, 0.22, 0.2, None],
        "num_tokens": [12_345, 12_345, 12_345, None],
    }
    earlier = [{"step": s, "share": [0.25 + s / 600] * 4, "by_chance": [0.26] * 4} for s in (50, 200)]
    drops = {"sequence_length": 256, "as_run": None, "by_capacity": stretches}
    return {"step": step, "layers": [1, 2, 3, 4], "dependence": dependence, "learning": earlier, "drops": drops}


def play(
    observers: Sequence[Observer],
    info: RunInfo,
    *,
    until: int,
    skip_at: int = -1,
    status: str | None = "finished",
    change: Callable[[Any], Any] = lambda record: record,
) -> None:
    """Tell `observers` of the steps after `info.start_step` up to `until`; None as status is a kill."""
    for observer in observers:
        observer.on_start(info)
    for step in range(info.start_step + 2, until + 1, 2):
        record = change(fake_step(step, info.num_steps, skipped=1 if 0 <= skip_at <= step else 0))
        for observer in observers:
            observer.on_step(record)
        if step % 50 == 0:
            for observer in observers:
                observer.on_eval(change(fake_eval(step)))
                observer.on_checkpoint(step, info.run_dir / "checkpoints" / f"step-{step:08d}", 0.21)
    if status is not None:
        for observer in observers:
            observer.on_end(status)
