"""Losses attached inside a model get the gradients of their mean over the global batch, under every engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leanmill.core.ledger import Ledger
from leanmill.core.stage import TechniqueModule
from leanmill.parallel import config as configs
from leanmill.parallel.build import build_engine
from tests.distributed import run_ranks
from tests.parallel import cases


TOKEN_WEIGHT, MICRO_WEIGHT = 0.3, 0.7
ENGINES = [
    configs.DdpEngine(),
    configs.FsdpEngine(),
    *(configs.DeepSpeedEngine(stage=stage) for stage in (1, 2, 3)),
]


class Penalty(TechniqueModule):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.per_token = ledger.open("token", per="token", weight=TOKEN_WEIGHT)
        self.per_micro = ledger.open("micro", per="micro_batch", weight=MICRO_WEIGHT)

    def forward(self, hidden: Tensor) -> Tensor:
        token, micro = penalties(hidden)
        return self.per_micro.attach(self.per_token.attach(hidden, token), micro)


def penalties(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A sum over tokens, and something that is no mean over tokens, so that micro-batches matter."""
    return hidden.square().sum(), hidden.mean((0, 1)).square().sum()


class WithPenalty(nn.Sequential):
    def __init__(self, mlp: nn.Module, ledger: Ledger | None) -> None:
        super().__init__(mlp, *([] if ledger is None else [Penalty(ledger)]))


def module_of(ledger: Ledger | None) -> cases.SumLoss:
    module = cases.make_module(torch.float32)
    for layer in module.model.model.layers:
        layer.mlp = WithPenalty(layer.mlp, ledger)
    if ledger is not None:
        module.add_module("ledger", ledger)
    return module


def gradients_of(config: configs.EngineConfig) -> tuple[dict[str, Tensor], Tensor, float]:
    ledger = Ledger()
    engine, _ = build_engine(config, ranks=cases.ranks_here(), precision="fp32", model_bytes=0)
    engine.prepare(module_of(ledger), cases.preparation())
    micro_batches, num_valid = cases.share_of(engine, 0)
    engine.forward_backward(micro_batches, num_valid)
    found = {name: gradient.detach().clone() for name, gradient in engine.gradients()}
    sums = ledger.take()
    engine.close()
    return found, sums, float(num_valid)


def by_hand(num_ranks: int) -> tuple[dict[str, Tensor], Tensor]:
    """Plain autograd on the micro-batches that `num_ranks` ranks have together."""
    module = module_of(None)
    cases.materialise(module)
    seen: list[Tensor] = []
    for layer in module.model.model.layers:
        layer.mlp.register_forward_hook(lambda *call: seen.append(call[-1]))
    batch = cases.rows(0)
    num_valid = (batch["labels"] != -100).sum()
    num_parts = num_ranks * cases.NUM_MICRO_BATCHES
    total, sums = torch.zeros(()), torch.zeros(2)
    for index in range(num_parts):
        seen.clear()
        losses = module({name: value.chunk(num_parts)[index] for name, value in batch.items()})
        token, micro = (torch.stack(parts) for parts in zip(*map(penalties, seen), strict=True))
        sums += torch.stack([token.detach().sum(), micro.detach().sum()])
        total = (
            total + (losses["total"] + TOKEN_WEIGHT * token.sum()) / num_valid + MICRO_WEIGHT * micro.sum() / num_parts
        )
    total.backward()
    return {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}, sums


def check(results: list[tuple[dict[str, Tensor], Tensor, float]], num_ranks: int) -> None:
    wanted, sums = by_hand(num_ranks)
    for found, *_ in results:
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    values = sum(part[1] for part in results)
    torch.testing.assert_close(values[::2, 0].sum(), sums[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values[1::2, 0].sum(), sums[1], rtol=1e-4, atol=1e-5)
    assert (values[:, 2] == num_ranks * cases.NUM_MICRO_BATCHES).all()


def test_one_process() -> None:
    check([gradients_of(configs.SingleEngine())], 1)


def _all_engines() -> list[tuple[dict[str, Tensor], Tensor, float]]:
    return [gradients_of(config) for config in ENGINES]


@pytest.fixture(scope="module")
def on_two_ranks() -> list[list[tuple[dict[str, Tensor], Tensor, float]]]:
    return run_ranks(_all_engines, 2)


@pytest.mark.parametrize("index", range(len(ENGINES)), ids=["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_two_ranks(index: int, on_two_ranks: list[list[tuple[dict[str, Tensor], Tensor, float]]]) -> None:
    check([rank[index] for rank in on_two_ranks], 2)
