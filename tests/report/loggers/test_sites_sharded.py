"""Site statistics are the same however the weights are spread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (here once, rather than in every forked rank)

from leanmill.parallel.launch import Ranks
from leanmill.report.loggers.sites import site_statistics
from tests.contract_cases import ENGINES
from tests.contract_training import recipe_of, train
from tests.distributed import run_ranks


NAMES = ("nm_sparsity", "ternary", "lora")


def _statistics(engine: dict[str, Any], ranks: Ranks) -> list[dict[str, Any]]:
    trained, _ = train(recipe_of(NAMES, engine, "", ranks.world_size), ranks, num_steps=1)
    found = list(site_statistics(trained, compute=ranks.rank == 0))
    # The engine still trains after rank 0 alone has run the stages.
    trained.full_parameter("model.norm.weight")
    trained.close()
    return found


def _alone() -> list[dict[str, Any]]:
    return _statistics({"type": "single"}, Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")))


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    return run_ranks(_alone, 1)[0]


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_two_ranks_report_what_one_does(engine: str, expected: list[dict[str, Any]]) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")

    def body() -> list[dict[str, Any]]:
        rank = torch.distributed.get_rank()
        ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
        return _statistics(ENGINES[engine], ranks)

    writer, other = run_ranks(body, 2)
    assert other == []
    assert [site["name"] for site in writer] == [site["name"] for site in expected]
    for site, reference in zip(writer, expected, strict=True):
        assert site["techniques"] == ["lora", "nm_sparsity", "ternary"]
        assert site["two_of_four"] == 1.0
        assert site["num_levels"] == reference["num_levels"] == 3
        assert site["high"] == pytest.approx(reference["high"], rel=1e-4)
        assert site["zero_fraction"] == pytest.approx(reference["zero_fraction"], abs=2e-3)
