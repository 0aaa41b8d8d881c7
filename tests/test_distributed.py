"""The harness reports what really happened on each rank."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks


def test_returns_results_by_rank() -> None:
    offset = torch.tensor([10.0])

    def body(scale: int) -> tuple[int, torch.Tensor]:
        value = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(value)
        return dist.get_rank() * scale, value + offset

    results = run_ranks(body, 3, 2)
    assert [rank for rank, _ in results] == [0, 2, 4]
    assert all(torch.equal(value, torch.tensor([13.0])) for _, value in results)


def test_shows_the_traceback_of_the_failing_rank() -> None:
    def body() -> None:
        if dist.get_rank() == 1:
            raise ValueError("only here")
        dist.barrier()

    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*ValueError: only here"):
        run_ranks(body, 2)


def test_reports_a_rank_that_dies() -> None:
    with pytest.raises(AssertionError, match="exit code 7"):
        run_ranks(lambda: os._exit(7), 1)


def test_kills_ranks_that_hang_and_says_where() -> None:
    def body() -> None:
        if dist.get_rank() == 0:
            time.sleep(100)

    with pytest.raises(AssertionError, match=r"(?s)hung for 2.* s.*in body"):
        run_ranks(body, 2, timeout_seconds=2.0)
