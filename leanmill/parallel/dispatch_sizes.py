"""What ranks tell each other before tokens travel: sizes, and what must be equal for them to fit.

A rank that expects another number, width or type of rows than it is sent would wait for ever, or read
memory as what it is not. So each rank gets every rank's numbers in one small all-gather, all judge the same
table, and all raise, or none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.parallel.exchange import Splits


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FACTS = ("num_experts", "top_k", "hidden width", "tokens' dtype", "combine weights' dtype", "gradients")
"""What must be the same on all ranks: the first columns of the table. The lowest and highest index follow."""
_NUM_FACTS = len(_FACTS) + 2


@dataclass(frozen=True)
class Sizes:
    """How much of one chunk of tokens travels."""

    splits: Splits
    """Rows to and from each rank."""
    num_copies: int
    """Copies that experts here take, over all rows that come."""
    told: list[list[int]] = field(default_factory=list)
    """What each rank told the others beside its sizes; the same for each chunk."""


def agree_on_chunks(num_chunks: int, group: dist.ProcessGroup, device: torch.device) -> None:
    """Check that all ranks cut their tokens into as many pieces: how long every later table is.

    A plain collective, which no recomputation repeats or looks for. Once a layer, for whoever spreads experts
    without `build_engine`, which compares whole layouts.

    Raises:
        RunError: They do not; the same on all ranks.
    """
    mine = torch.tensor([num_chunks], device=device)
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    found = [int(number) for number in everyone]
    if len(set(found)) > 1:
        raise RunError(_differ("layout.expert_chunks", [str(number) for number in found]))


def agree_on_sizes(
    ranks_of_rows: Tensor,
    ranks_of_copies: Tensor,
    tokens: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    num_experts: int,
    group: dist.ProcessGroup,
    num_chunks: int,
    tell: Tensor | None = None,
) -> list[Sizes]:
    """Exchange counts, check that all ranks speak of the same thing, and return the sizes of each chunk.

    One all-gather of 8 + 2 x chunks x ranks int64 a rank, and the one host synchronisation of a layer.

    Args:
        ranks_of_rows: [T, K] int64 in [0, ranks]: where each entry sends a row to; the number of ranks for none.
        ranks_of_copies: [T, K] likewise: where each copy's expert is.
        tokens: As they are sent, [T, H].
        top_k_index: [T, K], for its range.
        top_k_weights: As they are sent, [T, K].
        num_experts: Of all ranks.
        group: The ranks that experts are spread over.
        num_chunks: Pieces of T that travel one after the other, as `Tensor.tensor_split` makes them.
        tell: int64 [N], as many on each rank: what every rank is to know beside that (`Sizes.told`).

    Raises:
        RunError: Ranks disagree, or one routes to an expert that does not exist; the same on all ranks.
    """
    num_ranks = group.size()
    counts = [
        torch.stack([_count(ranks, num_ranks) for ranks in chunks])
        for chunks in (ranks_of_rows.tensor_split(num_chunks), ranks_of_copies.tensor_split(num_chunks))
    ]
    facts = _facts(tokens, top_k_index, top_k_weights, num_experts)
    mine = torch.cat([facts, *(count.flatten() for count in counts), *([] if tell is None else [tell])])
    table = _all_gather(mine, group)
    _check(table, num_experts)
    end = _NUM_FACTS + 2 * num_chunks * num_ranks
    starts = range(_NUM_FACTS, end, num_ranks)
    body = [[row[start : start + num_ranks] for row in table] for start in starts]
    me = group.rank()
    return [
        Sizes(
            Splits(send=body[chunk][me], receive=[row[me] for row in body[chunk]], group=group),
            num_copies=sum(row[me] for row in body[num_chunks + chunk]),
            told=[row[end:] for row in table],
        )
        for chunk in range(num_chunks)
    ]


def _count(ranks: Tensor, num_ranks: int) -> Tensor:
    """Entries for each rank [ranks], without waiting for the device."""
    flat = ranks.flatten()
    counts = torch.zeros(num_ranks + 1, dtype=torch.int64, device=ranks.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:num_ranks]


def _facts(tokens: Tensor, top_k_index: Tensor, top_k_weights: Tensor, num_experts: int) -> Tensor:
    gradients = 2 * tokens.requires_grad + top_k_weights.requires_grad
    dtypes = [_DTYPES.index(tensor.dtype) for tensor in (tokens, top_k_weights)]
    equal = torch.tensor([num_experts, top_k_index.shape[1], tokens.shape[1], *dtypes, gradients])
    ends = top_k_index.new_zeros(2)
    if top_k_index.numel():
        ends = torch.stack([top_k_index.min(), top_k_index.max()])
    return torch.cat([equal.to(ends.device, non_blocking=True), ends])


def _all_gather(mine: Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    functional = torch.ops._c10d_functional
    gathered = functional.all_gather_into_tensor(mine, group.size(), group.group_name)
    return functional.wait_tensor(gathered).view(group.size(), -1).tolist()  # type: ignore[no-any-return]


def _check(table: list[list[int]], num_experts: int) -> None:
    for column, name in enumerate(_FACTS):
        found = [row[column] for row in table]
        if len(set(found)) > 1:
            raise RunError(_differ(name, [_told(name, value) for value in found]))
    for rank, row in enumerate(table):
        lowest, highest = row[len(_FACTS) : _NUM_FACTS]
        if lowest < 0 or highest > num_experts:
            raise RunError(
                f"expert parallelism: rank {rank} routes to expert {lowest if lowest < 0 else highest} of "
                f"{num_experts}; a router must choose 0 .. {num_experts - 1}, or {num_experts} for a dropped copy"
            )


def _differ(name: str, found: list[Any]) -> str:
    told = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(found))
    return (
        f"expert parallelism: ranks differ in {name} ({told}), so no tokens were exchanged; start every rank with the "
        f"same recipe and the same checkpoint"
    )


def _told(name: str, value: int) -> Any:
    if name.endswith("dtype"):
        return _DTYPES[value]
    if name == "gradients":
        return ("none", "of weights", "of tokens", "of both")[value]
    return value
