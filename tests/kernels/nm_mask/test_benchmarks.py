"""The GPU figures of this group can be built and called; what they measure needs a GPU."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


def test_gpu_cases_run_at_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "kernel_case", raising=False)
    spec = importlib.util.spec_from_file_location("gpu_kernels_nm_mask", FOLDER / "kernels_nm_mask.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = module.cases(torch.device("cpu"), (32, 64))
    assert len({case.name for case in cases}) == len(cases) >= 18
    for case in cases:
        case.run()
        case.run()
        assert case.num_bytes > 0
    monkeypatch.delitem(sys.modules, "kernel_case", raising=False)
