"""A vocabulary in parts: values and gradients of torch's cross-entropy of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # once here instead of in every forked rank
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.linear_cross_entropy.split import split_linear_cross_entropy
from leanmill.parallel.tensor_exchange import GroupSplit
from tests.distributed import run_ranks


NUM_TOKENS, VOCAB_SIZE, WIDTH = 13, 22, 7


def _operands(dtype: torch.dtype, *, has_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(VOCAB_SIZE, (NUM_TOKENS,), generator=generator)
    labels[[2, 5]] = -100
    bias = draw(VOCAB_SIZE) if has_bias else None
    return draw(NUM_TOKENS, WIDTH), draw(VOCAB_SIZE, WIDTH), labels, bias, draw(NUM_TOKENS).float()


def _whole(dtype: torch.dtype, *, scale: float, softcap: float | None, has_bias: bool) -> list[Tensor]:
    hidden, weight, labels, bias, of_losses = _operands(dtype, has_bias=has_bias)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = scale * F.linear(hidden, weight, bias).to(torch.promote_types(dtype, torch.float32))
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, of_losses.to(losses.dtype))]


def _in_parts(dtype: torch.dtype, *, scale: float, softcap: float | None, has_bias: bool, chunk: int) -> Any:
    import torch.distributed as dist

    hidden, weight, labels, bias, of_losses = _operands(dtype, has_bias=has_bias)
    split = GroupSplit(dist.group.WORLD, by_rows=True)  # type: ignore[arg-type]
    parts = [None if t is None else t.chunk(2)[split.rank].clone().requires_grad_() for t in (weight, bias)]
    hidden.requires_grad_()
    losses = split_linear_cross_entropy(
        split.enter(hidden),
        parts[0],  # type: ignore[arg-type]
        labels,
        parts[1],
        first_row=split.rank * VOCAB_SIZE // 2,
        total=split.total,
        largest=split.largest,
        logit_scale=scale,
        softcap=softcap,
        chunk_tokens=chunk,
    )
    leaves = [hidden, *(part for part in parts if part is not None)]
    return [losses.detach(), *torch.autograd.grad(losses, leaves, of_losses.to(losses.dtype))]


CASES: list[dict[str, Any]] = [
    {"scale": 1.0, "softcap": None, "has_bias": False},
    {"scale": 0.3, "softcap": 2.0, "has_bias": True},
]


def test_values_and_gradients_are_those_of_whole_logits() -> None:
    dtypes = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}

    def body() -> list[list[Tensor]]:
        return [_in_parts(dtype, **case, chunk=chunk) for dtype in dtypes for case in CASES for chunk in (4, 64)]

    first, second = run_ranks(body, 2)
    wanted = [(_whole(dtype, **case), dtypes[dtype]) for dtype in dtypes for case in CASES for _ in (4, 64)]
    for one, other, (whole, tolerance) in zip(first, second, wanted, strict=True):
        together = [one[0], one[1], *(torch.cat(pair) for pair in zip(one[2:], other[2:], strict=True))]
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        for found, value in zip(together, whole, strict=True):
            torch.testing.assert_close(found, value, rtol=tolerance, atol=tolerance)


def test_losses_far_from_zero_do_not_overflow() -> None:
    def body() -> Tensor:
        import torch.distributed as dist

        split = GroupSplit(dist.group.WORLD, by_rows=True)  # type: ignore[arg-type]
        weight = torch.tensor([[400.0], [-400.0]]) if split.rank == 0 else torch.tensor([[399.0], [0.0]])
        options: dict[str, Any] = {"first_row": 2 * split.rank, "total": split.total, "largest": split.largest}
        return split_linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([2, 1]), **options)

    wanted = F.cross_entropy(torch.tensor([[400.0, -400.0, 399.0, 0.0]] * 2), torch.tensor([2, 1]), reduction="none")
    for losses in run_ranks(body, 2):
        torch.testing.assert_close(losses, wanted)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_token_without_a_label_may_hold_infinities(rank: int) -> None:
    hidden = torch.tensor([[float("inf")], [1.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [2.0]], requires_grad=True)
    labels = torch.tensor([-100, rank])
    losses = split_linear_cross_entropy(hidden, weight, labels, first_row=0, total=lambda t: t, largest=lambda t: t)
    losses.sum().backward()
    assert losses[0] == 0
    assert hidden.grad is not None
    assert hidden.grad[1].isfinite().all()
