"""NOLA: sums of a hashed basis, values and gradients, nothing of the basis kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import leanmill.peft_ext  # noqa: F401 (registers)
from leanmill.peft_ext.tuners import nola
from leanmill.peft_ext.tuners.nola import NolaConfig, NolaLayer, basis, combination


OUT, IN, R, K = 7, 5, 3, 11


def layer_of(**options) -> NolaLayer:
    torch.manual_seed(2)
    config = NolaConfig(r=R, alpha=6.0, num_basis=K, **options)
    return NolaLayer(nn.Linear(IN, OUT).requires_grad_(False), "default", config, module_name="model.layers.0.proj")


@pytest.mark.parametrize("at_once", [1, 40, 2**22])
def test_values_and_gradients(at_once: int, monkeypatch: pytest.MonkeyPatch):
    """Koohpayegani et al. 2023, arXiv:2310.02556: A = sum a_m U_m, B = sum b_m V_m; here A0 is added to A."""
    monkeypatch.setattr(nola, "_AT_ONCE", at_once)
    layer = layer_of(init_weights=False)
    keys = layer.nola_key["default"]
    u, v = basis(keys[:1], R * IN, 0, K + 1).view(-1, R, IN), basis(keys[1:], OUT * R, 0, K).view(-1, OUT, R)
    alpha, beta = (p["default"].detach().clone().requires_grad_() for p in (layer.nola_alpha, layer.nola_beta))
    a = (alpha[:, None, None] * u[:K]).sum(0) + u[K] / IN**0.5
    b = (beta[:, None, None] * v).sum(0)
    x, upstream = torch.randn(2, 4, IN), torch.randn(2, 4, OUT)
    expected = layer.base_layer(x) + 2.0 * x @ (b @ a).T
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.get_delta_weight("default"), 2.0 * b @ a, rtol=1e-4, atol=1e-4)
    out.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(layer.nola_alpha["default"].grad, alpha.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.nola_beta["default"].grad, beta.grad, rtol=1e-4, atol=1e-3)


def test_the_basis_is_uniform_and_is_kept_nowhere():
    key = torch.tensor([123456789])
    drawn = basis(key, 1000, 0, 50)
    assert drawn.min() >= -1
    assert drawn.max() < 1
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.var() - 1 / 3) < 0.01
    assert torch.equal(drawn[7:9], basis(key, 1000, 7, 2))
    correlation = torch.corrcoef(drawn)
    assert (correlation - torch.eye(50)).abs().max() < 0.2
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        combination(torch.ones(50, requires_grad=True), key, (20, 50))
    assert max(kept) == 1


def test_it_starts_as_the_base_and_learns_in_both_factors():
    layer = layer_of()
    x = torch.randn(3, IN)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    layer(x).square().sum().backward()
    assert layer.nola_beta["default"].grad.count_nonzero() == K
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 2 * K


def test_a_large_index_is_another_number():
    key = torch.tensor([5])
    assert not torch.equal(basis(key, 2**20, 2**11, 1), basis(key, 2**20, 0, 1))


@pytest.mark.parametrize(("options", "expected"), [({"r": 0}, "r must be"), ({"num_basis": 1.5}, "num_basis must be")])
def test_what_is_refused(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        NolaConfig(**options)
