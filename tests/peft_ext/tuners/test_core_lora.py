"""s B N A: each variant's start and gradients against its paper's equations."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import leanmill.peft_ext  # noqa: F401 (registers)
from leanmill.core.errors import RunError
from leanmill.peft_ext.peft.gradient_start import GradientStart
from leanmill.peft_ext.tuners.core_lora import CoreLoraConfig, CoreLoraLayer


OUT, IN, R = 7, 5, 3


def layer_of(variant: str, *, alpha: float = 6.0, dtype: torch.dtype = torch.float32, **options) -> CoreLoraLayer:
    torch.manual_seed(1)
    base = nn.Linear(IN, OUT, bias=True, dtype=dtype)
    base.requires_grad_(False)
    return CoreLoraLayer(base, "default", CoreLoraConfig(r=R, alpha=alpha, variant=variant, **options))


def factors(layer: CoreLoraLayer) -> tuple[torch.Tensor, ...]:
    return tuple(p.detach().clone().requires_grad_() for p in layer.parameters_in_order())


@pytest.mark.parametrize("variant", ["lora_xs", "lora_sb", "moslora", "nlora", "int_tune"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(variant: str, dtype: torch.dtype):
    layer = layer_of(variant, dtype=dtype)
    n0, a0, b0 = (p.detach().clone() for p in layer.parameters_in_order())
    with torch.no_grad():
        for p in layer.parameters_in_order():
            if p.requires_grad or variant == "lora_sb":
                p.add_(0.3 * torch.randn_like(p))
    n, a, b = factors(layer)
    assert layer.scaling["default"] == 2.0
    x, upstream = torch.randn(2, 4, IN, dtype=dtype), torch.randn(2, 4, OUT, dtype=dtype)
    delta = 2.0 * (b @ n @ a)
    if variant in ("nlora", "int_tune"):
        delta = delta - 2.0 * (b0 @ n0 @ a0)
    expected = (layer.base_layer(x).float() + x.float() @ delta.float().T).to(dtype)
    out = layer(x)
    tight = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    torch.testing.assert_close(out, expected, **tight)
    torch.testing.assert_close(layer.get_delta_weight("default").float(), delta.float(), **tight)
    out.backward(upstream)
    expected.backward(upstream)
    core_alone = variant in ("lora_xs", "lora_sb", "int_tune")
    for p, want in zip(layer.parameters_in_order(), (n, a, b), strict=True):
        if core_alone and p is not layer.core_lora_N["default"]:
            assert not p.requires_grad
            assert p.grad is None
        else:
            loose = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1e-1, "atol": 3e-1}
            torch.testing.assert_close(p.grad.float(), want.grad.float(), **loose)


def test_lora_xs_holds_the_largest_singular_vectors():
    """Banaei et al. 2024, arXiv:2405.17604: W ~ U_r S_r V_r^T, B = U_r S_r, A = V_r^T, R ~ N(0, 1e-5)."""
    layer = layer_of("lora_xs")
    n, a, b = factors(layer)
    u, s, v = torch.linalg.svd(layer.base_layer.weight)
    torch.testing.assert_close(b @ a, u[:, :R] @ s[:R].diag() @ v[:R], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.eye(R), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.norm(dim=0), s[:R], rtol=1e-4, atol=1e-5)
    assert 0 < n.abs().max() < 1e-4
    assert (a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all()


def test_lora_sb_starts_as_the_best_part_of_a_first_step():
    """Ponkshe et al. 2024, arXiv:2411.19557: s B R A is the best approximation of -eta sign(sum of gradients)."""
    layer = layer_of("lora_sb")
    x = torch.randn(2, IN)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    gradient, eta = torch.randn(OUT, IN), 0.01
    layer.start_from_gradient(gradient, eta)
    n, a, b = factors(layer)
    u, s, v = torch.linalg.svd(-eta * gradient.sign())
    best = u[:, :R] @ s[:R].diag() @ v[:R]
    torch.testing.assert_close(2.0 * b @ n @ a, best, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(b.T @ b, torch.eye(R), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(a @ a.T, torch.eye(R), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(n, (s[:R] / 2.0).diag(), rtol=1e-4, atol=1e-6)


def test_the_collected_gradient_is_the_weights():
    layer = layer_of("lora_sb")
    layer.base_layer.weight.requires_grad_(True)
    layer.collect(True)
    for _ in range(2):
        layer(torch.randn(2, 3, IN)).square().sum().backward()
    torch.testing.assert_close(layer.collected(), layer.base_layer.weight.grad)
    for p in layer.parameters_in_order():
        assert p.grad is None or p.grad.count_nonzero() == 0
    layer.collect(False)
    layer(torch.randn(2, 3, IN)).sum().backward()


@pytest.mark.parametrize("mixer", ["orthogonal", "kaiming"])
def test_moslora_mixes_subspaces(mixer: str):
    """Wu et al. 2024, arXiv:2406.11909: x W + x A M B, the mixer orthogonal or Kaiming, B zero."""
    layer = layer_of("moslora", mixer=mixer)
    n, a, b = factors(layer)
    assert b.count_nonzero() == 0
    assert a.abs().max() <= 1 / math.sqrt(IN)
    if mixer == "orthogonal":
        torch.testing.assert_close(n @ n.T, torch.eye(R), rtol=1e-4, atol=1e-5)
    else:
        assert n.abs().max() <= 1 / math.sqrt(R)


@pytest.mark.parametrize("variant", ["nlora", "int_tune"])
def test_nystroem_starts_from_rows_and_columns(variant: str):
    """Guo et al. 2025, arXiv:2502.14482: W ~ W[:, :r] pinv(W[:r, :r]) W[:r]; the sum starts as the base."""
    layer = layer_of(variant)
    weight = layer.base_layer.weight
    n, a, b = factors(layer)
    assert torch.equal(a, weight[:R])
    assert torch.equal(b, weight[:, :R])
    torch.testing.assert_close(n @ weight[:R, :R], torch.eye(R), rtol=1e-3, atol=1e-4)
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"r": 0}, "integer of at least 1"),
        ({"r": 6}, "above the shorter side of a layer of 7 x 5; use 5 or less"),
        ({"variant": "xs"}, "variant must be one of lora_xs"),
        ({"mixer": "zeros"}, "orthogonal or kaiming"),
        ({"bias": "some"}, "bias must be 'none', 'all' or"),
    ],
)
def test_what_is_refused(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        CoreLoraLayer(nn.Linear(IN, OUT), "default", CoreLoraConfig(**options))


def test_a_gradient_that_is_not_finite_starts_nothing():
    layer = layer_of("lora_sb")
    model, context = nn.Sequential(layer), SimpleNamespace(step=0, views=object())
    rule = GradientStart(model, 0.1)
    rule.begin_step(context)
    model(torch.full((2, IN), float("nan"))).sum().backward()
    with pytest.raises(RunError, match="non-finite gradient in the first step"):
        rule.before_optimizer(context)
