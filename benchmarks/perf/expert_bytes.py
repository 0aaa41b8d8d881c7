"""Bytes a rank sends for a layer of experts, all-to-all against fully sharded: counted, by formula, simulated.

At 2 and 4 real ranks every send of a forward and backward is counted and held against the guide's formula; it is
then evaluated, with the code that places experts and chooses copies, for up to 1,024 ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import conditions, write_result
from torch import Tensor, nn

from leanmill.core.experts import set_dispatch, stacked_parameters
from leanmill.parallel import dispatch_sizes, exchange, fssdp_dispatch, fssdp_travel
from leanmill.parallel.dispatch import AllToAllDispatch
from leanmill.parallel.fssdp_dispatch import FullyShardedDispatch
from leanmill.parallel.fssdp_placement import Owners, Prices, choose_owners, contiguous_owners, fewest_bytes, loaded


@dataclass(frozen=True)
class Shape:
    """A layer of experts and the tokens that one rank has for it."""

    num_experts: int
    top_k: int
    hidden: int
    width: int
    tokens: int
    value_bytes: int

    @property
    def expert_bytes(self) -> int:
        """Of the weights of one expert: gate, up and down."""
        return 3 * self.hidden * self.width * self.value_bytes


SMALL = Shape(num_experts=16, top_k=4, hidden=64, width=128, tokens=1024, value_bytes=4)
"""At real ranks; a rank's tokens for an expert are on both sides of where a copy costs as much."""
QWEN3_30B = Shape(num_experts=128, top_k=8, hidden=2048, width=768, tokens=4096, value_bytes=2)
"""Simulated: a layer of Qwen3-30B-A3B, 4,096 tokens a rank and micro-batch, bf16."""
WAYS = ("all_to_all", "loaded", "fewest_bytes")
WEIGHT_BYTES = INDEX_BYTES = 4


def route(shape: Shape, skew: float, seed: int) -> Tensor:
    """Draw [T, K] different experts a token; expert i with odds 1 / (i + 1)^skew, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    odds = -skew * torch.arange(1, shape.num_experts + 1).log()
    odds = odds[torch.randperm(shape.num_experts, generator=torch.Generator().manual_seed(0))]
    uniform = torch.rand(shape.tokens, shape.num_experts, generator=generator).clamp(1e-9, 1 - 1e-7)
    return (odds - (-uniform.log()).log()).topk(shape.top_k, dim=1).indices


@dataclass
class Sent:
    """What one rank sends and holds for a layer in a micro-batch."""

    rows: Tensor
    """Of its tokens to each rank, its own included, int64 [ranks]."""
    copies: Tensor
    """Token copies to the experts of each rank [ranks]."""
    wanted: Tensor
    """Experts it fetches, bool [E]."""


def sent_by(shape: Shape, index: Tensor, owners: Tensor, rank: int, num_ranks: int, way: str) -> Sent:
    """Return what `rank` sends, chosen by the code of the run."""
    wanted = torch.zeros(shape.num_experts, dtype=torch.bool)
    if way == "loaded":
        wanted = loaded(index, owners, rank)
    elif way == "fewest_bytes":
        wanted = fewest_bytes(index, owners, rank, prices(shape))
    ranks = owners.masked_fill(wanted, rank)[index]
    rows = fssdp_dispatch.once_a_rank(ranks, num_ranks)
    counts = (each.flatten().bincount(minlength=num_ranks + 1)[:num_ranks] for each in (rows, ranks))
    return Sent(*counts, wanted)


def prices(shape: Shape) -> Prices:
    return Prices.of(
        hidden_size=shape.hidden,
        top_k=shape.top_k,
        parameters_per_expert=3 * shape.hidden * shape.width,
        bytes_per_value=shape.value_bytes,
        bytes_per_weight=WEIGHT_BYTES,
        rematerialise=True,
    )


def formula(shape: Shape, way: str, *, rows_out: int, rows_in: int, given: int, fetched: int, num_ranks: int) -> int:
    """Bytes that a rank sends for a layer in a micro-batch, without recomputed blocks: see the guide.

    Args:
        shape: The layer.
        way: Of `WAYS`.
        rows_out: Rows of its tokens that other ranks get.
        rows_in: Rows that it gets from others.
        given: Copies of its own experts that others hold.
        fetched: Copies of others' that it holds.
        num_ranks: That share the experts.
    """
    row = 2 * shape.hidden * shape.value_bytes
    table = 8 + 2 * num_ranks + (0 if way == "all_to_all" else -(-shape.num_experts // 32))
    return (
        rows_out * (row + shape.top_k * (WEIGHT_BYTES + INDEX_BYTES))
        + rows_in * (row + shape.top_k * WEIGHT_BYTES)
        + (2 * given + fetched) * shape.expert_bytes
        + 8 * table * (num_ranks - 1)
    )


# Real ranks.


@contextmanager
def counting() -> Iterator[list[int]]:
    """Note the bytes of each message to another rank, where messages are sent."""
    found: list[int] = []
    begin, travel, gather = exchange._Trip.begin, fssdp_travel.exchange, dispatch_sizes._all_gather

    def counted_trip(trip: Any, rows: Tensor) -> None:
        splits = trip._splits
        others = sum(splits.send) - splits.send[splits.group.rank()]
        found.append(others * rows[:1].numel() * rows.element_size() if len(rows) else 0)
        begin(trip, rows)

    def counted_travel(send: Any, receive: Any, group: Any) -> None:
        found.extend(tensor.numel() * tensor.element_size() for _, tensor in send)
        travel(send, receive, group)

    def counted_gather(mine: Tensor, group: Any) -> Any:
        found.append((group.size() - 1) * mine.numel() * mine.element_size())
        return gather(mine, group)

    exchange._Trip.begin = counted_trip  # type: ignore[method-assign]
    fssdp_travel.exchange, dispatch_sizes._all_gather = counted_travel, counted_gather  # type: ignore[assignment]
    try:
        yield found
    finally:
        exchange._Trip.begin = begin  # type: ignore[method-assign]
        fssdp_travel.exchange, dispatch_sizes._all_gather = travel, gather


def layer_of(shape: Shape, way: str, owners: Owners) -> nn.Module:
    """This rank's experts, with the dispatch over all ranks; values do not matter."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(hidden_size=shape.hidden, moe_intermediate_size=shape.width, num_experts=shape.num_experts)
    module, group = Qwen3MoeExperts(config), dist.group.WORLD
    assert group is not None
    for name in stacked_parameters(module):
        rest = getattr(module, name).shape[1:]
        setattr(module, name, nn.Parameter(torch.randn(owners.count(group.rank()), *rest) * 0.02))
    dispatch: Any = (
        AllToAllDispatch(group, shape.num_experts)
        if way == "all_to_all"
        else FullyShardedDispatch(module, group, owners, materialise=way, rematerialise=True)  # type: ignore[arg-type]
    )
    set_dispatch(module, dispatch, "experts")
    return module


def counted(shape: Shape, way: str, index: Tensor, owners: Owners) -> int:
    """Bytes that this rank sends in a forward and backward."""
    module = layer_of(shape, way, owners)
    tokens = torch.randn(shape.tokens, shape.hidden, requires_grad=True)
    weights = torch.rand(shape.tokens, shape.top_k, requires_grad=True)
    with counting() as found:
        module(tokens, index, weights).sum().backward()
    return sum(found)


def owners_for(shape: Shape, skew: float, num_ranks: int, way: str) -> Owners:
    """Contiguous ones for all-to-all, else those of an earlier step's loads."""
    if way == "all_to_all":
        return contiguous_owners(shape.num_experts, num_ranks)
    loads = route(shape, skew, seed=12345).flatten().bincount(minlength=shape.num_experts)
    return choose_owners([loads.double().tolist()], num_ranks)[0]


def real(shape: Shape, skew: float) -> dict[str, dict[str, float]]:
    """Counted bytes of the ranks and those of the formula, by way."""
    num_ranks = dist.get_world_size()
    figures = {}
    routes = [route(shape, skew, seed=rank) for rank in range(num_ranks)]
    for way in WAYS:
        owners = owners_for(shape, skew, num_ranks, way)
        by_formula = [one["bytes"] for one in simulated_ranks(shape, routes, way, owners)]
        mine = counted(shape, way, routes[dist.get_rank()], owners)
        everyone = [torch.zeros(1, dtype=torch.int64) for _ in range(num_ranks)]
        dist.all_gather(everyone, torch.tensor([mine]))
        found = [int(one) for one in everyone]
        figures[way] = {
            "counted_bytes_a_rank": statistics.mean(found),
            "formula_bytes_a_rank": statistics.mean(by_formula),
            "largest_error": max(abs(a / b - 1) for a, b in zip(found, by_formula, strict=True)),
        }
    return figures


# Simulation.


def simulated_ranks(shape: Shape, routes: Sequence[Tensor], way: str, owners: Owners) -> list[dict[str, int]]:
    """Bytes and token copies of every rank, which share one layer's experts, from where each sends its tokens."""
    placed, num_ranks = torch.tensor(owners), len(routes)
    sent = [sent_by(shape, index.long(), placed, rank, num_ranks, way) for rank, index in enumerate(routes)]
    rows, copies = (torch.stack([getattr(one, name) for one in sent]) for name in ("rows", "copies"))
    wanted = torch.stack([one.wanted for one in sent])
    given = torch.zeros(num_ranks, dtype=torch.int64).scatter_add_(0, placed, wanted.sum(0))
    stay = rows.diagonal()
    return [
        {
            "bytes": formula(
                shape,
                way,
                rows_out=int(rows[rank].sum() - stay[rank]),
                rows_in=int(rows[:, rank].sum() - stay[rank]),
                given=int(given[rank]),
                fetched=int(wanted[rank].sum()),
                num_ranks=num_ranks,
            ),
            "tokens": int(copies[:, rank].sum()),
            "fetched": int(wanted[rank].sum()),
        }
        for rank in range(num_ranks)
    ]


def simulated(shape: Shape, skew: float, num_ranks: int) -> dict[str, dict[str, float]]:
    """Bytes and balance by way; all-to-all within groups of as many ranks as experts, which then share each expert."""
    figures = {}
    routes = [route(shape, skew, seed=rank).to(torch.int16) for rank in range(num_ranks)]
    for way in WAYS:
        group = min(num_ranks, shape.num_experts) if way == "all_to_all" else num_ranks
        ranks: list[dict[str, int]] = []
        for first in range(0, num_ranks, group):
            owners = owners_for(shape, skew, group, way)
            ranks += simulated_ranks(shape, routes[first : first + group], way, owners)
        sharers = num_ranks // group
        # Where several ranks have the same experts: two gathers of their shares and a reduction.
        shares = 3 * (sharers - 1) / sharers * shape.num_experts / group * shape.expert_bytes
        sizes, tokens = ([one[name] for one in ranks] for name in ("bytes", "tokens"))
        figures[way] = {
            "megabytes_a_rank": round((statistics.mean(sizes) + shares) / 1e6, 1),
            "most_megabytes_a_rank": round((max(sizes) + shares) / 1e6, 1),
            "copies_fetched_a_rank": round(statistics.mean(one["fetched"] for one in ranks), 2),
            "max_over_mean_tokens_a_rank": round(max(tokens) / statistics.mean(tokens), 3),
        }
    return figures


def work(folder: Path, skews: Sequence[float]) -> None:
    """What every real rank does."""
    torch.set_num_threads(1)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=120),
    )
    figures = {f"zipf {skew:g}": real(SMALL, skew) for skew in skews}
    if rank == 0:
        (folder / "figures.json").write_text(json.dumps(figures))
    dist.barrier()
    os._exit(0)  # gloo threads that ran collectives inside autograd may abort at the interpreter's exit


def on_ranks(num_ranks: int) -> Any:
    """Start real ranks and return what they found."""
    with tempfile.TemporaryDirectory() as folder:
        world = {"WORLD_SIZE": str(num_ranks), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([sys.executable, __file__, "--meeting", folder], env=os.environ | world | {"RANK": str(r)})
            for r in range(num_ranks)
        ]
        if any(codes := [process.wait() for process in started]):
            sys.exit(f"ranks ended with {codes}")
        return json.loads((Path(folder) / "figures.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[8, 64, 1024], help="simulated")
    parser.add_argument("--skews", type=float, nargs="*", default=[0.0, 0.6, 1.2], help="exponents of Zipf's law")
    parser.add_argument("--meeting", type=Path, help="set for the ranks that this script starts")
    arguments = parser.parse_args()
    if arguments.meeting is not None:
        work(arguments.meeting, arguments.skews)
    measured_under = conditions()
    figures: dict[str, Any] = {f"{ranks} real ranks": on_ranks(ranks) for ranks in (2, 4)}
    for num_ranks in arguments.ranks:
        for skew in arguments.skews:
            figures[f"{num_ranks} simulated ranks, zipf {skew:g}"] = simulated(QWEN3_30B, skew, num_ranks)
    write_result("expert_bytes", figures, measured_under)


if __name__ == "__main__":
    main()
