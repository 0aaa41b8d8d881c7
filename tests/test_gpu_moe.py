"""The GPU benchmark of mixtures: its smallest size on whatever device there is, and its models as recipes."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from leanmill.plan.plan import plan
from tests.data.samples import write_jsonl


NAMES = ("kernel_case", "kernels", "moe")


@pytest.fixture
def moe(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks" / "gpu"))
    # The CPU benchmarks have modules of the same names.
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("moe")
    for name in NAMES:
        sys.modules.pop(name, None)


def test_products_are_the_same_whoever_computes_them(moe):
    found = moe.products(moe.SMALLEST, torch.device("cpu"))
    names = ["gate_up_forward", "gate_up_forward_backward", "down_forward", "down_forward_backward"]
    assert [product.name for product in found] == names
    for product in found:
        ours, theirs, dense = product.ours(), product.torchs(), product.dense()
        if product.name.endswith("backward"):
            assert len(ours) == len(theirs) == len(dense) == 2
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
        else:
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
            assert dense.shape == ours.shape
    assert found[0].num_flops == 2 * 24 * 2 * 32 * 32


def test_models_have_the_parameters_they_are_named_by(moe, monkeypatch):
    size = moe.SIZES["olmoe_1b_7b"]
    mixture = plan(moe.recipe_of(moe.mixture_model(size, 16), device="cuda"))
    dense = plan(moe.recipe_of(moe.dense_model(size, 16), device="cuda"))
    assert 6.7e9 < mixture.num_parameters < 7.1e9
    assert 1.1e9 < mixture.num_active < 1.4e9
    assert dense.num_parameters == pytest.approx(mixture.num_active, rel=0.01)
    assert dense.flops_per_token == pytest.approx(mixture.flops_per_token, rel=0.01)
    assert moe.layers_that_fit(size, 139 * 2**30) == 16
    assert moe.layers_that_fit(size, 12 * 2**30, most=3) < 3


def test_the_smallest_models_train(moe, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"text {n} and more of it" * 5} for n in range(60)])
    data = {
        "source": {"type": "hf", "path": str(tmp_path / "a.jsonl"), "validation_fraction": 0.2},
        "cache_dir": str(tmp_path / "cache"),
        "sequence_length": 32,
        "tokenizer": {"vocab_size": 300},
    }
    rows = {}
    for kind, model in (
        ("dense", moe.dense_model(moe.SMALLEST, 1, 16)),
        ("moe", moe.mixture_model(moe.SMALLEST, 1, 16)),
    ):
        found = moe.trained(moe.recipe_of(model, device="cpu", small=True, data=data), 1e12)
        rows[kind] = moe.line(kind, found)
        assert found["mfu_of_measured_matmul"] > 0
        assert ("max_violation" in found) == (kind == "moe")
    assert "MaxVio" in rows["moe"]
    assert "not run" in moe.line("late", moe.attempt("late", dict, 0.0))
