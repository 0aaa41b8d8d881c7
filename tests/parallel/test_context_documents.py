"""Attention of whole documents and parts of others is attention over whole rows: values, gradients, what is sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanmill.parallel.context_attention import ContextAttention
from leanmill.parallel.context_documents import Cut
from leanmill.parallel.context_plan import pair_cost, sent_numbers
from leanmill.parallel.context_rows import CutDocuments, documents
from leanmill.parallel.context_shares import Share, part_bounds
from tests.distributed import run_ranks
from tests.parallel.test_context_attention import SIZE, Sent


LENGTHS = (3, 7, 2, 1, 5, 4)
SHARES = {
    2: (Share(1, 0), Share(2, 0), Share(1, 1), Share(2, 0), Share(2, 0), Share(1, 1)),
    4: (Share(1, 0), Share(4, 0), Share(2, 2), Share(4, 0), Share(2, 0), Share(1, 3)),
}
"""A document of one token is cut too, so that a rank has a part without tokens."""
HEADS = [(4, 4), (4, 2), (4, 1)]


def _operands(heads: int, groups: int) -> list[Tensor]:
    torch.manual_seed(heads + groups)
    return [torch.randn(1, n, sum(LENGTHS), SIZE, dtype=torch.float64) for n in (heads, groups, groups, heads)]


def _by_hand(heads: int, groups: int, window: int | None) -> list[Tensor]:
    query, key, value, outer = _operands(heads, groups)
    given = [tensor.requires_grad_() for tensor in (query, key, value)]
    places = [(begin, place) for begin, length in _begins() for place in range(begin, begin + length)]
    rows = []
    for head in range(heads):
        k, v = key[0, head * groups // heads], value[0, head * groups // heads]
        for begin, place in places:
            first = begin if window is None else max(begin, place - window + 1)
            rows.append((query[0, head, place] @ k[first : place + 1].T * 0.3).softmax(-1) @ v[first : place + 1])
    found = torch.stack(rows).view(1, heads, -1, SIZE)
    (found * outer).sum().backward()
    return [found.detach(), *(tensor.grad for tensor in given)]  # type: ignore[list-item]


def _begins() -> list[tuple[int, int]]:
    return [(sum(LENGTHS[:index]), length) for index, length in enumerate(LENGTHS)]


def _places(rank: int, shares: tuple[Share, ...]) -> tuple[list[int], list[tuple[int, int]]]:
    """The places of a rank in the order of its parts, and those."""
    mine = [
        (share, begin, length)
        for share, (begin, length) in zip(shares, _begins(), strict=True)
        if share.first_rank <= rank < share.first_rank + share.degree
    ]
    places, parts = [], []
    for share, begin, length in sorted(mine, key=lambda one: -one[0].degree):
        first, end = part_bounds(length, share.degree, rank - share.first_rank)
        places += range(begin + first, begin + end)
        parts.append((share.degree, length))
    return places, parts


def _on_ranks(kind: Any, heads: int, groups: int, window: int | None) -> tuple[list[int], list[Tensor], int, int]:
    world = dist.group.WORLD
    assert world is not None
    subgroups = {world.size(): world}
    if world.size() == 4:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        subgroups[2] = pairs[world.rank() // 2]  # type: ignore[assignment]
    places, parts = _places(world.rank(), SHARES[world.size()])
    query, key, value, outer = (tensor[:, :, places].clone() for tensor in _operands(heads, groups))
    given = [tensor.requires_grad_() for tensor in (query, key, value)]
    sent = Sent()
    found, _ = ContextAttention(world, kind, subgroups)(
        nn.Identity(), *given, None, scaling=0.3, sliding_window=window, document_parts=torch.tensor(parts)
    )
    numbers = sent.end()
    (found * outer.transpose(1, 2)).sum().backward()
    expected = sum(
        -(-length // degree) * sent_numbers(heads, groups, SIZE, degree, kind) for degree, length in parts if degree > 1
    )
    return places, [found.detach().transpose(1, 2), *(t.grad for t in given)], numbers, expected  # type: ignore[misc]


def _check(world_size: int, heads: int, groups: int, window: int | None) -> None:
    wanted = _by_hand(heads, groups, window)
    for kind in ("ulysses", "all_gather"):
        results = run_ranks(lambda kind=kind: _on_ranks(kind, heads, groups, window), world_size)
        assert sorted(place for places, *_ in results for place in places) == list(range(sum(LENGTHS)))
        for places, tensors, numbers, expected in results:
            assert numbers == expected
            for index, (found, whole) in enumerate(zip(tensors, wanted, strict=True)):
                torch.testing.assert_close(
                    found, whole[:, :, places], rtol=0, atol=1e-12, msg=lambda t, i=(kind, index): f"{i}: {t}"
                )


def test_two_ranks_attend_as_one_does() -> None:
    _check(2, 4, 1, window=3)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_four_ranks_attend_as_one_does(heads: int, groups: int, window: int | None) -> None:
    _check(4, heads, groups, window)


@pytest.mark.parametrize("degree", [2, 3])
def test_orders_of_travel_undo_each_other(degree: int) -> None:
    cuts = [Cut((5, 1, 7), degree, index, torch.device("cpu")) for index in range(degree)]
    numbers = torch.arange(13).split([5, 1, 7])
    padded = []
    for cut in cuts:
        own = torch.cat(
            [document[first:end] for document, (first, end) in zip(numbers, cut.bounds(cut.index), strict=True)]
        )
        sent = torch.cat([own, torch.tensor([-1])])[cut.own_to_padded()]
        assert torch.equal(sent[cut.padded_to_own()], own)
        padded.append(sent)
    whole = torch.cat(padded)[cuts[0].all_to_whole()]
    assert whole.tolist() == list(range(13))
    assert torch.equal(torch.cat([whole, torch.tensor([-1])])[cuts[0].whole_to_all()], torch.cat(padded))


class _Rank:
    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def _batch() -> dict[str, Tensor]:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 1], [3, 4, 5, 6, 7, 8, 9, 10]])
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 6:] = False
    ids = torch.arange(16).view(2, 8)
    return {"input_ids": ids, "labels": ids + 100, "position_ids": positions, "token_mask": mask}


def test_documents_of_a_batch_leave_padding_out() -> None:
    # A row that begins inside a document begins one here.
    assert documents(_batch()) == [(0, 3), (3, 2), (5, 1), (8, 8)]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_have_every_token_once(size: int) -> None:
    parts = [CutDocuments(_Rank(rank, size), "ulysses", {}).part(_batch()) for rank in range(size)]  # type: ignore[arg-type]
    tokens = torch.cat([part["input_ids"][0] for part in parts])
    assert sorted(tokens.tolist()) == [*range(6), *range(8, 16)]
    for part in parts:
        assert torch.equal(part["labels"], part["input_ids"] + 100)
        assert torch.equal(part["position_ids"][0], _batch()["position_ids"].flatten()[part["input_ids"][0]])


def test_a_rank_without_a_token_computes_one_that_adds_nothing() -> None:
    ids = torch.tensor([[7, 8]])
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[0, 1]])}
    parts = [CutDocuments(_Rank(rank, 4), "ulysses", {}).part(batch) for rank in range(4)]  # type: ignore[arg-type]
    assert [part["labels"].tolist() for part in parts] == [[[7]], [[8]], [[-100]], [[-100]]]


def test_work_of_a_pair_against_that_of_a_token() -> None:
    config = SimpleNamespace(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=3, vocab_size=10, tie_word_embeddings=False
    )
    assert pair_cost(config, 1080) == 2 * 2 * 4 * 3 / 1000
    config.tie_word_embeddings = True
    assert pair_cost(config, 1080) == 2 * 2 * 4 * 3 / 1080
