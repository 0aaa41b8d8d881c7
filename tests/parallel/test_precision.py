from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from leanmill.kernels.native import processor
from leanmill.parallel.precision import resolve_precision


ATTENTION_IN_WHAT_AUTO_CHOOSES = """
import torch
from leanmill.parallel.precision import resolve_precision
precision = resolve_precision("auto", "cpu")
dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
q = torch.randn(1, 2, 256, 64, dtype=dtype, requires_grad=True)
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
print(precision)
"""
AMX = {"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def pretend(capabilities: dict[str, object], torch_capability: str) -> None:
        processor.multiplies_natively.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: torch_capability)

    yield pretend
    processor.multiplies_natively.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "torch_capability", "expected"),
    [
        (AMX, "AVX512", "bf16"),
        (AMX, "AVX2", "fp32"),
        (AMX, "DEFAULT", "fp32"),
        ({"architecture": "x86_64", "avx512_f": True}, "AVX512", "fp32"),
        # Torch calls its vector code for plain ARM the default.
        ({"architecture": "aarch64", "bf16": True}, "DEFAULT", "bf16"),
        ({"architecture": "aarch64", "neon": True}, "DEFAULT", "fp32"),
    ],
)
def test_auto_is_bf16_where_processor_and_torch_have_it(machine, capabilities, torch_capability, expected):
    machine(capabilities, torch_capability)
    assert resolve_precision("auto", "cpu") == expected
    assert resolve_precision("bf16", "cpu") == "bf16"


def test_without_the_library_for_products_auto_is_fp32(machine, monkeypatch):
    machine(AMX, "AVX512")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert resolve_precision("auto", "cpu") == "fp32"


@pytest.mark.skipif(torch.cpu.get_capabilities().get("architecture") != "x86_64", reason="x86's names of capabilities")
def test_auto_asks_what_torch_was_told_to_use():
    result = subprocess.run(
        [sys.executable, "-c", ATTENTION_IN_WHAT_AUTO_CHOOSES],
        env=os.environ | {"ATEN_CPU_CAPABILITY": "default"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split() == ["fp32"], result.stderr
