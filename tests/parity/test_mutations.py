"""The matrix can fail: mistakes of the kind that leave a loss right are caught, and named by their factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed.fsdp  # with the next ones, once here instead of in every forked rank
import transformers.models.llama.modeling_llama
import transformers.models.mixtral.modeling_mixtral  # noqa: F401
from torch import Tensor

from leanmill.parallel import torch_engine
from leanmill.parallel.ddp import DdpEngine
from leanmill.parallel.engine import Engine
from leanmill.parallel.layout import Layout
from tests.distributed import run_ranks
from tests.parity.cells import Cell
from tests.parity.running import Result, reference, run_cells


def _cell(engine: str, layout: str = "dp", accumulation: int = 3) -> Cell:
    return Cell(
        world_size=2,
        engine=engine,
        layout=layout,
        model="llama" if layout == "dp" else "mixtral",
        technique="dense",
        accumulation=accumulation,
        recompute="none",
        rows="packed",
        precision="fp64",
    )


def _sums_over_ranks(patch: pytest.MonkeyPatch) -> None:
    before = Engine._begin_backward
    patch.setattr(Engine, "_begin_backward", lambda self, *args: self.data_size * before(self, *args))


def _forgets_micro_batches(patch: pytest.MonkeyPatch) -> None:
    before = Engine._begin_backward
    patch.setattr(Engine, "_begin_backward", lambda self, batches, n: before(self, batches, n) / len(batches))


def _never_reduces(patch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def micro_batch(self: Any, *, is_last: bool) -> Iterator[None]:
        with self._replicated.no_sync():
            yield

    patch.setattr(DdpEngine, "_micro_batch", micro_batch)


def _clips_by_its_own_part(patch: pytest.MonkeyPatch) -> None:
    def norm(tensors: list[Any], device: torch.device) -> Tensor:
        return torch.nn.utils.get_total_norm([tensor.to_local() for tensor in tensors]).float()

    patch.setattr(torch_engine, "global_norm", norm)


def _counts_experts_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Layout, "divisor", lambda self, family: 1)


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Cell, str, set[str], str]] = {
    "gradients summed": (_sums_over_ranks, _cell("ddp"), "gradient", {"attention", "mlp"}, "scaled by data ranks"),
    "accumulation divided twice": (
        _forgets_micro_batches,
        _cell("fsdp"),
        "gradient",
        {"attention", "mlp"},
        "scaled by 1 / micro-batches",
    ),
    "no all-reduce": (_never_reduces, _cell("ddp"), "gradient", {"attention", "mlp"}, "an all-reduce is missing"),
    "local norm": (
        _clips_by_its_own_part,
        _cell("fsdp"),
        "norm",
        {"all"},
        "that of its own part: the sum",
    ),
    "experts not divided": (_counts_experts_once, _cell("ddp", "ep2"), "gradient", {"experts"}, "scaled by"),
}


def _mutated() -> dict[str, Result]:
    results = {}
    for mutation, (mutate, cell, *_) in MUTATIONS.items():
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            for result in run_cells([cell], ""):
                results[mutation] = result
    return results


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    for _, cell, *_ in MUTATIONS.values():
        reference(cell, "")
    return run_ranks(_mutated, 2)[0]


@pytest.mark.xdist_group("parity mutations")
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mistakes_are_named(mutation: str, results: dict[str, Result]) -> None:
    _, _, quantity, families, reason = MUTATIONS[mutation]
    result = results[mutation]
    named = {one.family for one in result.failed if one.quantity == quantity and reason in one.reason}
    assert named >= families, result.table()
    if quantity == "norm" or families == {"experts"}:
        assert {one.family for one in result.failed if one.quantity == "gradient"} <= families, result.table()
