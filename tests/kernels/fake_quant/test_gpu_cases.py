"""The cases of the GPU benchmark build and run, small and on whatever device there is."""

import importlib
import sys
from pathlib import Path

import pytest

from tests.kernels.launcher import DEVICE


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"))
    # The CPU benchmarks have modules of the same names.
    for name in ("kernel_case", "kernels_fake_quant"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("kernels_fake_quant")
    yield module.cases(DEVICE, 128, 16)
    for name in ("kernel_case", "kernels_fake_quant"):
        sys.modules.pop(name, None)


def test_cases_run(cases):
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        case.run()
        if case.peer is not None:
            case.peer()
