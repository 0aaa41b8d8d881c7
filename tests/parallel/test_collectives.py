from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from leanmill.parallel.collectives import (
    among,
    barrier,
    broadcast_object,
    gather_objects,
    is_first_rank,
    max_over_ranks,
    same_on_all_ranks,
    sum_over_ranks,
)
from tests.distributed import run_ranks


def body() -> dict[str, Any]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    mine = torch.tensor([1.0, float(rank)])
    result = {"sum": sum_over_ranks(mine), "max": max_over_ranks(mine), "mine": mine}
    objects = [{"rank": rank, "text": "ä" * (rank + 1), "list": (1, 2)}, None, "", []]
    result["objects"] = [broadcast_object(value) for value in objects]
    result["gathered"] = gather_objects({"rank": rank, "text": "ä" * rank})
    result["same"] = [same_on_all_ranks(value) for value in ({"b": 1, "a": [2]}, {"rank": rank}, rank == 1)]
    result["first"] = is_first_rank()
    barrier()
    return result


def test_all_ranks_may_be_those_of_a_group() -> None:
    def of_pairs() -> dict[str, Any]:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        with among(pairs[dist.get_rank() // 2]):
            inside = body()
        return inside | {"outside": sum_over_ranks(torch.ones(()))}

    for rank, result in enumerate(run_ranks(of_pairs, 4)):
        first = 2 * (rank // 2)
        assert result["sum"].tolist() == [2.0, 2 * first + 1]
        assert result["objects"][0]["rank"] == first
        assert result["outside"] == 4
        assert [one["rank"] for one in result["gathered"]] == [first, first + 1]
        assert result["first"] == (rank == first)


def test_collectives() -> None:
    for rank, result in enumerate(run_ranks(body, 3)):
        assert result["sum"].tolist() == [3.0, 3.0]
        assert result["max"].tolist() == [1.0, 2.0]
        assert result["mine"].tolist() == [1.0, rank]  # left as it was
        assert result["objects"] == [{"rank": 0, "text": "ä", "list": [1, 2]}, None, "", []]
        assert result["gathered"] == [{"rank": r, "text": "ä" * r} for r in range(3)]
        assert result["same"] == [True, False, False]
        assert result["first"] == (rank == 0)


def test_one_process_needs_no_group() -> None:
    result = body()
    assert result["sum"].tolist() == [1.0, 0.0]
    assert result["objects"][0] == {"rank": 0, "text": "ä", "list": [1, 2]}
    assert result["gathered"] == [{"rank": 0, "text": ""}]
    assert result["same"] == [True, True, True]
    assert result["first"]
