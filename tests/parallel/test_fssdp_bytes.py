"""What ranks send for experts, counted where it is sent, is what the guide's formula says."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

from tests.distributed import run_ranks


FOLDER = Path(__file__).parents[2] / "benchmarks/perf"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("expert_bytes", FOLDER / "expert_bytes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, "expert_bytes", module)
    spec.loader.exec_module(module)
    return module


def test_counted_bytes_are_those_of_the_formula(benchmark: Any) -> None:
    # Narrow, so that some copies cost less than tokens and some more.
    shape = replace(benchmark.SMALL, tokens=96, hidden=8, width=8)
    (first, second) = run_ranks(lambda: benchmark.real(shape, 1.2), 2)
    assert first == second
    for way, found in first.items():
        assert found["largest_error"] == 0, way
        assert found["counted_bytes_a_rank"] > 0
    assert first["fewest_bytes"]["counted_bytes_a_rank"] < first["loaded"]["counted_bytes_a_rank"]
    assert first["fewest_bytes"]["counted_bytes_a_rank"] < first["all_to_all"]["counted_bytes_a_rank"]
