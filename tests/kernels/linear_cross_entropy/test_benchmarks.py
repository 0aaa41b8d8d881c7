"""The GPU figures of the losses can be built and called; what they measure needs a GPU."""

import importlib.util
import sys
from pathlib import Path

import torch


FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


def test_gpu_cases_run_at_tiny_size(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "kernel_case", raising=False)
    spec = importlib.util.spec_from_file_location("gpu_kernels_losses", FOLDER / "kernels_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cases = module.cases(torch.device("cpu"), ((20, 300, 16),))
    assert len(cases) == 2
    for case in cases:
        case.run()
        case.peer()
        assert case.num_flops > 0
    monkeypatch.delitem(sys.modules, "kernel_case", raising=False)
