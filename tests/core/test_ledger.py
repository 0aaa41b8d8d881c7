"""Losses injected inside a model have the gradients and values that autograd gives them outside."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanmill.core.account import Account, write_late
from leanmill.core.ledger import Ledger, ledger_of
from leanmill.core.stage import TechniqueModule
from leanmill.models.activation_checkpointing import _selective_contexts
from leanmill.trainer.meter import Meter


NUM_BLOCKS, WIDTH = 3, 6
TOKEN_SCALE, NUM_MICRO_BATCHES = 0.125, 2


class Noted(TechniqueModule):
    """Two losses of one layer: one known in forward, one whose coefficients come later."""

    def __init__(self, ledger: Ledger, layer: int) -> None:
        super().__init__()
        self.square = ledger.open(f"square/{layer}", per="token", weight=0.5)
        self.late = ledger.open("late", per="micro_batch", weight=3.0)
        self.register_buffer("coefficients", torch.zeros(WIDTH), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.square.attach(x, x.square().sum())
        return self.late.inject(x, x.float().mean(0), self.coefficients)


class Block(nn.Module):
    def __init__(self, ledger: Ledger | None, layer: int, mode: str) -> None:
        super().__init__()
        self.linear, self.mode = nn.Linear(WIDTH, WIDTH), mode
        self.noted = None if ledger is None else Noted(ledger, layer)

    def body(self, x: Tensor) -> Tensor:
        x = self.linear(x).tanh()
        return x if self.noted is None else self.noted(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "none":
            return self.body(x)
        options = {"context_fn": _selective_contexts} if self.mode == "selective" else {}
        return checkpoint(self.body, x, use_reentrant=False, **options)


class Stack(nn.Module):
    def __init__(self, mode: str, ledger: Ledger | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(ledger, layer, mode) for layer in range(NUM_BLOCKS)])
        self.ledger = ledger

    def forward(self, x: Tensor) -> Tensor:
        return functools.reduce(lambda value, block: block(value), self.blocks, x)


def inputs() -> Tensor:
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()


def coefficients(layer: int) -> Tensor:
    return torch.arange(WIDTH).float() + layer


def by_hand() -> tuple[dict[str, Tensor], list[float]]:
    stack, x = Stack("none", None), inputs()
    total, squares = torch.zeros(()), []
    for layer, block in enumerate(stack.blocks):
        x = block(x)
        squares.append(float(x.detach().square().sum()))
        total = total + 0.5 * TOKEN_SCALE * x.square().sum()
        total = total + 3.0 / NUM_MICRO_BATCHES * (coefficients(layer) * x.mean(0)).sum()
    (total + TOKEN_SCALE * x.sum()).backward()
    return {name: p.grad for name, p in stack.named_parameters()}, squares


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_gradients_and_values_are_those_of_plain_autograd(mode, compiled):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ledger = Ledger()
    stack = Stack(mode, ledger)
    if compiled:
        for block in stack.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    ledger.begin_step(token_scale=torch.tensor(TOKEN_SCALE), num_micro_batches=NUM_MICRO_BATCHES)
    out = stack(inputs())
    for layer, block in enumerate(stack.blocks):
        write_late(block.noted.coefficients, coefficients(layer))
    (TOKEN_SCALE * out.sum()).backward()
    gradients, squares = by_hand()
    for name, gradient in gradients.items():
        torch.testing.assert_close(stack.get_parameter(name).grad, gradient)
    sums = ledger.take()
    assert sums[::2, 0].tolist() == pytest.approx(squares), "each forward counts once, its recomputation not"
    assert sums[::2, 2].tolist() == [1.0] * NUM_BLOCKS
    assert not ledger.take().any()
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "layers share one graph"


def test_nothing_is_attached_in_eval():
    ledger = Ledger()
    stack = Stack("none", ledger).eval()
    x = inputs()
    assert torch.equal(stack(x), Stack("none", None)(x))
    assert not ledger.take().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_carrier_keeps_its_values_and_its_own_gradient(dtype):
    account = Ledger().open("a", per="token")
    x = torch.randn(3, 4).to(dtype).requires_grad_()
    carrier = account.attach(x, x.sum())
    assert carrier.dtype == dtype
    assert carrier.equal(x)
    carrier.sum().backward()
    assert x.grad.equal(torch.ones(3, 4, dtype=dtype)), "before any step's scale is written, the loss adds nothing"


def test_a_loss_without_gradients_passes_none():
    account = Ledger().open("a", per="token")
    x = torch.randn(3, requires_grad=True)
    account.attach(x, torch.tensor(2.0)).sum().backward()
    assert x.grad.equal(torch.ones(3))


def test_a_ledger_is_found_in_its_train_module():
    ledger = Ledger()
    assert ledger_of(Stack("none", ledger)) is ledger
    assert ledger_of(nn.Linear(1, 1)) is None


def test_the_record_holds_every_place_their_mean_and_the_whole_objective():
    ledger = Ledger()
    first, second = (ledger.open(f"balance/{n}", per="micro_batch", weight=0.5) for n in range(2))
    distance = ledger.open("distance", per="token", weight=2.0)
    meter = Meter(torch.device("cpu"), ledger=ledger)
    for _ in range(2):
        for account, value in ((first, 1.0), (first, 3.0), (second, 5.0), (second, 7.0), (distance, 20.0)):
            account.note(torch.tensor([value]))
        losses = {"total": torch.tensor(30.0), "cross_entropy": torch.tensor(30.0)}
        meter.update(losses, torch.tensor(10.0), torch.ones(()), torch.tensor(False))
    record = meter.record(step=2, tokens=0, lr=0.1, tokens_per_step=10, metrics={})
    assert record.losses == pytest.approx(
        {
            "cross_entropy": 3.0,
            "balance": 4.0,
            "balance/0": 2.0,
            "balance/1": 6.0,
            "distance": 2.0,
            "total": 3.0 + 0.5 * (2.0 + 6.0) + 2.0 * 2.0,
        }
    )


def test_a_rule_may_write_the_weight():
    ledger = Ledger()
    account: Account = ledger.open("a", per="token", weight=1.0)
    ledger.begin_step(token_scale=torch.tensor(2.0), num_micro_batches=1)
    account.factor.fill_(0.25)
    x = torch.ones(3, requires_grad=True)
    (0.0 * account.attach(x, x.sum())).sum().backward()
    assert x.grad.tolist() == [0.5] * 3
    assert ledger.take()[0].tolist() == [3.0, 0.75, 1.0]
