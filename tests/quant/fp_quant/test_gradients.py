"""Rounded gradients of what layers compute, against both products written out."""

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.site import LinearSite
from leanmill.export.activations import settle_activations
from leanmill.quant.fp_quant.formats import format_of
from leanmill.quant.fp_quant.stage import TokenRounding, make_inputs, make_weights
from tests.core.tiny import install, loss_of, tiny, tokens


def e5m2(values):
    """Rounded by torch's own dtype, each token at a scale that its largest magnitude is 57344 times."""
    scale = (values.float().abs().amax(-1, keepdim=True) / 57344).clamp(min=torch.finfo(torch.float32).tiny)
    return ((values.float() / scale).to(torch.float8_e5m2).float() * scale).to(values.dtype)


def mantissa_of_two_bits(values):
    """bfloat16's range with two bits of mantissa, ties to even: what e8m2 is."""
    bits = values.float().view(torch.int32)
    return ((bits + 0x0FFFFF + ((bits >> 21) & 1)) & ~0x1FFFFF).view(torch.float32).to(values.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("name", "by_hand"), [("e5m2", e5m2), ("e8m2", mantissa_of_two_bits)])
@pytest.mark.parametrize("activations", [None, "e4m3"])
def test_one_rounding_serves_both_products(name, by_hand, activations, bias, dtype):
    torch.manual_seed(0)
    site = LinearSite.adopt(nn.Linear(24, 13, bias=bias).to(dtype), "layer")
    site.put(make_weights([format_of("e4m3")], "absmax", "tensor", None))
    rounding = None if activations is None else TokenRounding(format_of(activations))
    site.put_input(make_inputs(rounding, TokenRounding(format_of(name))))
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 5, 13, dtype=dtype) * torch.exp(2 * torch.randn(2, 5, 1)).to(dtype)
    out = site(x)
    weight, seen = site.effective_weight().detach(), x.detach() if rounding is None else rounding.rounded(x.detach())
    torch.testing.assert_close(out, nn.functional.linear(seen, weight, site.bias).detach(), rtol=1e-5, atol=1e-5)
    out.backward(upstream)
    rounded = by_hand(upstream)
    assert not torch.equal(rounded, upstream)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.1}
    torch.testing.assert_close(x.grad, rounded @ weight, **close)
    torch.testing.assert_close(site.weight.grad, rounded.flatten(0, 1).T @ seen.flatten(0, 1), **close)
    if bias:
        torch.testing.assert_close(site.bias.grad, rounded.sum((0, 1)), **close)


def test_a_warm_up_mixes_gradients_too():
    torch.manual_seed(0)
    stage = make_inputs(None, TokenRounding(format_of("e5m2")), has_warmup=True)
    product = torch.randn(3, 8, requires_grad=True)
    upstream = torch.randn(3, 8)
    for strength in (0.0, 0.25, 1.0):
        stage.strength.fill_(strength)
        product.grad = None
        stage.on_product(product).backward(upstream)
        torch.testing.assert_close(product.grad, torch.lerp(upstream, e5m2(upstream), strength))


def test_nothing_but_gradients_changes_and_an_export_says_nothing_of_it():
    plain, model = tiny(), tiny()
    install(model, {"type": "fp_quant", "weight_format": "e8m10", "gradient_format": "e5m2"})
    same = tiny()
    install(same, {"type": "fp_quant", "weight_format": "e8m10"})
    ids = tokens()
    losses = [loss_of(one, ids) for one in (model, same)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    gradients = [{n: p.grad for n, p in one.named_parameters()} for one in (model, same)]
    assert any(not torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert gradients[0].keys() == dict(plain.named_parameters()).keys()
    assert settle_activations(model, "trained") == ()


def test_experts_get_rounded_gradients():
    exact, rounded = tiny("mixtral"), tiny("mixtral")
    install(exact, {"type": "fp_quant", "weight_format": "e8m10"})
    install(rounded, {"type": "fp_quant", "weight_format": "e8m10", "gradient_format": "e8m1"})
    ids = tokens()
    for model in (exact, rounded):
        loss_of(model, ids).backward()
    for name in ("gate_up_proj", "down_proj"):
        one, other = (
            model.model.layers[1].mlp.experts.get_parameter(name).grad.flatten() for model in (exact, rounded)
        )
        assert not torch.equal(one, other)
        assert torch.cosine_similarity(one, other, 0) > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_format": "fp8"}, r"fp_quant.gradient_format=fp8 would be searched .* e.g. e5m2"),
        ({"gradient_format": "e9m1"}, "is no format here"),
        ({"gradient_format": "e5m2", "targets": ["lm_head", "embed_tokens"]}, "gradients of logits|looks rows up"),
        ({"gradient_format": "mxfp8_e5m2", "targets": ["q_proj"]}, None),
    ],
)
def test_what_is_refused(options, message):
    if message is None:
        install(tiny(), {"type": "fp_quant", "weight_format": "e4m3", **options})
        return
    with pytest.raises((ConfigError, ValueError), match=message):
        install(tiny(), {"type": "fp_quant", "weight_format": "e4m3", **options})


def test_blocks_must_divide_outputs():
    with pytest.raises(ConfigError, match=r"blocks of 32 .* do not divide its 16 outputs; add .*exclude"):
        install(tiny(), {"type": "fp_quant", "weight_format": "e4m3", "gradient_format": "mxfp8_e5m2"})
    assert parse_technique({"type": "fp_quant", "gradient_format": "e5m2"}).gradient_format == "e5m2"
