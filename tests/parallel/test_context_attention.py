"""Attention over rows that ranks share is attention over whole rows: values, gradients, and what is sent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.parallel.context_attention import ContextAttention, seen
from leanmill.parallel.context_plan import repeats, sent_numbers
from tests.distributed import run_ranks


BATCH, LENGTH, SIZE = 2, 8, 4
DOCUMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3], [1, 1, 1, 1, 1, 1, 1, 1]])
HEADS = [(4, 4), (4, 2), (4, 1), (12, 3)]
"""Fewer heads of keys than ranks, and a number that the ranks do not divide."""


def _operands(heads: int, groups: int) -> list[Tensor]:
    torch.manual_seed(heads + groups)
    return [torch.randn(BATCH, n, LENGTH, SIZE, dtype=torch.float64) for n in (heads, groups, groups, heads)]


def _by_hand(heads: int, groups: int, window: int | None) -> list[Tensor]:
    """Values [B, S, H, D] and the gradients of query, key and value, place by place."""
    query, key, value, outer = _operands(heads, groups)
    given = [tensor.requires_grad_() for tensor in (query, key, value)]
    rows = []
    for row in range(BATCH):
        for head in range(heads):
            k, v = key[row, head * groups // heads], value[row, head * groups // heads]
            for place in range(LENGTH):
                first = 0 if window is None else max(0, place - window + 1)
                near = [p for p in range(first, place + 1) if DOCUMENTS[row, p] == DOCUMENTS[row, place]]
                weights = (query[row, head, place] @ k[near].T * 0.3).softmax(-1)
                rows.append(weights @ v[near])
    found = torch.stack(rows).view(BATCH, heads, LENGTH, SIZE)
    (found * outer).sum().backward()
    return [found.detach().transpose(1, 2), *(tensor.grad for tensor in given)]  # type: ignore[list-item]


def _on_ranks(kind: Any, heads: int, groups: int, window: int | None) -> tuple[list[Tensor], int]:
    """This rank's part of the same, and the numbers that it sent in forward."""
    group = dist.group.WORLD
    assert group is not None
    length = LENGTH // group.size()
    part = slice(group.rank() * length, (group.rank() + 1) * length)
    query, key, value, outer = (tensor[:, :, part].clone() for tensor in _operands(heads, groups))
    given = [tensor.requires_grad_() for tensor in (query, key, value)]
    sent = Sent()
    found, _ = ContextAttention(group, kind)(
        nn.Identity(), *given, None, scaling=0.3, sliding_window=window, document_ids=DOCUMENTS
    )
    numbers = sent.end()
    (found * outer.transpose(1, 2)).sum().backward()
    return [found.detach(), *(tensor.grad for tensor in given)], numbers  # type: ignore[misc]


class Sent:
    """Counts the numbers that leave this rank."""

    def __init__(self) -> None:
        self.numbers, self._kept = 0, (dist.all_to_all_single, dist.all_gather)
        swap, gather = self._kept
        dist.all_to_all_single = self._noting(swap, lambda size, ranks: size // ranks * (ranks - 1))
        dist.all_gather = self._noting(gather, lambda size, ranks: size * (ranks - 1))

    def _noting(self, call: Any, leaving: Callable[[int, int], int]) -> Any:
        def noting(arrived: Any, sent: Tensor, group: dist.ProcessGroup) -> Any:
            self.numbers += leaving(sent.numel(), group.size())
            return call(arrived, sent, group=group)

        return noting

    def end(self) -> int:
        dist.all_to_all_single, dist.all_gather = self._kept
        return self.numbers


def _check(world_size: int, heads: int, groups: int, window: int | None) -> None:
    wanted = _by_hand(heads, groups, window)
    for kind in ("ulysses", "all_gather"):
        results = run_ranks(lambda kind=kind: _on_ranks(kind, heads, groups, window), world_size)
        for index, whole in enumerate(wanted):
            found = torch.cat([parts[index] for parts, _ in results], 1 if index == 0 else 2)
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-12, msg=lambda t, i=(kind, index): f"{i}: {t}")
        tokens = BATCH * LENGTH // world_size
        assert {numbers for _, numbers in results} == {tokens * sent_numbers(heads, groups, SIZE, world_size, kind)}


def test_two_ranks_attend_as_one_does() -> None:
    _check(2, 4, 1, window=3)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_four_ranks_attend_as_one_does(heads: int, groups: int, window: int | None) -> None:
    _check(4, heads, groups, window)


def test_heads_of_keys_are_repeated_no_more_than_it_takes() -> None:
    assert [repeats(heads, groups, 4) for heads, groups in (*HEADS, (32, 8), (8, 2))] == [1, 2, 4, 4, 1, 2]


def test_a_token_sees_its_document_up_to_itself() -> None:
    assert seen(DOCUMENTS, 4, 2, None)[:, 0].int().tolist() == [
        [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]],
        [[1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0, 0]],
    ]
    assert seen(DOCUMENTS, 4, 2, 2)[1, 0].int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]


class _Two:
    def size(self) -> int:
        return 2


@pytest.mark.parametrize("more", [{"softcap": 5.0}, {"s_aux": 1.0}, {"dropout": 0.1}, {"document_ids": None}])
def test_what_a_family_asks_for_besides_is_refused(more: dict[str, Any]) -> None:
    given = _operands(4, 4)[:3]
    attention = ContextAttention(_Two(), "ulysses")  # type: ignore[arg-type]
    with pytest.raises(RunError, match="set layout.cp=1"):
        attention(nn.Identity(), *given, None, **{"document_ids": DOCUMENTS, **more})
