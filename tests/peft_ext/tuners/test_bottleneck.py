"""Series and parallel adapters against the papers' equations: values, gradients, starts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn

import leanmill.peft_ext  # noqa: F401 (registers)
from leanmill.peft_ext.tuners.bottleneck import ACTIVATIONS, BottleneckConfig, BottleneckLayer


OUT, IN, R = 7, 5, 3


def layer_of(name: str = "proj", *, dtype: torch.dtype = torch.float32, **options) -> BottleneckLayer:
    torch.manual_seed(1)
    base = nn.Linear(IN, OUT, dtype=dtype).requires_grad_(False)
    config = BottleneckConfig(r=R, alpha=6.0, **{"init_weights": False, **options})
    return BottleneckLayer(base, "default", config, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("placement", "name"), [("series", "proj"), ("series", "up_proj"), ("parallel", "up_proj")])
def test_values_and_gradients(placement: str, name: str, activation: str, dtype: torch.dtype):
    layer = layer_of(name, placement=placement, activation=activation, dtype=dtype)
    d, u = (p["default"] for p in (layer.bottleneck_down, layer.bottleneck_up))
    weight, bias = layer.base_layer.weight.float(), layer.base_layer.bias.float()
    x, upstream = torch.randn(2, 4, IN, dtype=dtype, requires_grad=True), torch.randn(2, 4, OUT)
    x0, d0, u0 = (t.detach().float().requires_grad_() for t in (x, d, u))

    def f(z: torch.Tensor) -> torch.Tensor:
        return 2.0 * ACTIVATIONS[activation](z @ d0.T) @ u0.T

    if placement == "parallel":
        expected = x0 @ weight.T + bias + f(x0)
    elif name == "up_proj":
        expected = (x0 + f(x0)) @ weight.T + bias
    else:
        expected = x0 @ weight.T + bias
        expected = expected + f(expected)
    out = layer(x)
    assert out.dtype == dtype
    out.backward(upstream.to(dtype))
    expected.backward(upstream)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-1, "atol": 1e-1}
    torch.testing.assert_close(out.float(), expected, **tolerance)
    for got, want in ((x, x0), (d, d0), (u, u0)):
        torch.testing.assert_close(got.grad.float(), want.grad, **tolerance)


@pytest.mark.parametrize("options", [{}, {"placement": "parallel"}, {"before": ["proj"]}])
def test_starts_as_the_base_and_can_be_switched_off(options: dict):
    layer, x = layer_of(init_weights=True, **options), torch.randn(3, IN)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    moved = layer_of(**options)
    assert (moved(x) - moved.base_layer(x)).abs().max() > 1e-2
    moved._disable_adapters = True
    torch.testing.assert_close(moved(x), moved.base_layer(x), rtol=0, atol=0)
    assert moved.bottleneck_down["default"].shape == (R, OUT if not options else IN)


def test_it_is_no_matrix():
    model = nn.Sequential(nn.Linear(IN, IN))
    model.config = {"model_type": "custom"}  # type: ignore[assignment]
    wrapped = get_peft_model(model, BottleneckConfig(r=2, target_modules=["0"]))
    for call in (wrapped.merge_adapter, wrapped.merge_and_unload):
        with pytest.raises(NotImplementedError, match="no matrix"):
            call()
    assert not wrapped.base_model.model[0].supports_lora_conversion()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"placement": "inside"}, "placement must be one of series, parallel, got 'inside'"),
        ({"activation": "sine"}, "activation must be one of tanh, relu, gelu, silu"),
        ({"before": "up_proj"}, "before must be a list of names"),
        ({"placement": "parallel", "before": ["up_proj"]}, "read with placement=.series. alone"),
        ({"r": 0}, "r must be an integer of at least 1"),
    ],
)
def test_what_is_refused(options: dict, expected: str):
    with pytest.raises(ValueError, match=expected):
        BottleneckConfig(**options)
