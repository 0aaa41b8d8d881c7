"""When Liger is taken and what it is asked for; its own numbers need a GPU."""

import sys
from types import ModuleType

import pytest
import torch

from leanmill.kernels.linear_cross_entropy import liger
from leanmill.kernels.linear_cross_entropy import op as op_module
from leanmill.kernels.linear_cross_entropy.naive import Form, token_losses
from leanmill.kernels.linear_cross_entropy.op import linear_cross_entropy


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"device_type": "cpu"}, False),
        ({"dtype": torch.float64}, False),
        ({"form": Form(scale=2.0)}, False),
        ({"form": Form(z_loss=0.1)}, False),
        ({"chunk_tokens": 8}, False),
        ({"is_tracing": True}, False),
    ],
)
def test_the_rule(monkeypatch, change, expected):
    given = {"device_type": "cuda", "dtype": torch.bfloat16, "form": Form(), "chunk_tokens": None, "is_tracing": False}
    monkeypatch.setattr(liger, "is_installed", lambda: True)
    assert liger.covers(**(given | change)) is expected
    monkeypatch.setattr(liger, "is_installed", lambda: False)
    assert not liger.covers(**(given | change))


def test_it_is_not_imported_to_see_whether_it_is_there():
    liger.is_installed()
    assert "liger_kernel" not in sys.modules


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_what_it_is_asked_for(monkeypatch, reduction):
    asked = []

    def stub(hidden, weight, labels, bias=None, ignore_index=-100, reduction="mean", accum_dtype=None):
        asked.append((reduction, accum_dtype))
        return token_losses(hidden, weight, bias, labels, Form(), ignore_index).sum()

    functional = ModuleType("liger_kernel.transformers.functional")
    functional.liger_fused_linear_cross_entropy = stub
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, functional.__name__, functional)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.tensor([1, -100, 3, 8, 0, 2])
    expected = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    monkeypatch.setattr(op_module.liger, "covers", lambda *given, is_tracing: True)
    got = linear_cross_entropy(hidden, weight, labels, reduction=reduction)
    torch.testing.assert_close(got, expected)
    # Losses of single tokens are ours whatever is installed.
    assert asked == ([] if reduction == "none" else [("sum", torch.float32)])
