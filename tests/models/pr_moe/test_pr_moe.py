"""PR-MoE's layer against its equations, and its families' folders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen
from tests.models.families import tiny_config


def built(**changes: object) -> tuple[ModelConfig, torch.nn.Module]:
    config = ModelConfig(config=tiny_config("pr_moe", num_experts_per_tok=2, **changes))
    model = build_on_meta(config)
    make_materialiser(config, seed=3)(model)
    return config, model


def by_hand(x: Tensor, own: dict[str, Tensor], top_k: int) -> Tensor:
    """arXiv:2201.05596 section 3.2 and deepspeed/moe/layer.py: softmax(W x + b) mixes experts and MLP."""
    rows = []
    for row in x.flatten(0, 1):
        shares = torch.softmax(own["gate.weight"] @ row, 0)
        chosen = torch.argsort(shares, descending=True)[:top_k]
        routed = torch.zeros_like(row)
        for expert in chosen.tolist():
            gate, up = (own["experts.gate_up_proj"][expert] @ row).chunk(2)
            routed = routed + shares[expert] * (own["experts.down_proj"][expert] @ (F.silu(gate) * up))
        gate, up = own["mlp.gate_proj.weight"] @ row, own["mlp.up_proj.weight"] @ row
        residual = own["mlp.down_proj.weight"] @ (F.silu(gate) * up)
        c = torch.softmax(own["coefficient.weight"] @ row + own["coefficient.bias"], 0)
        rows.append(c[0] * routed + c[1] * residual)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_is_its_equation_with_all_gradients(layer: int) -> None:
    _, model = built()
    block = model.model.layers[layer].mlp
    with torch.no_grad():
        for parameter in block.parameters():  # large enough to tell
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) / 4)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    own = {name: p.detach().clone().requires_grad_() for name, p in block.named_parameters()}
    weights = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    output, expected = block(x), by_hand(twin, own, 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-4, atol=1e-5, msg=name)
    half = block.bfloat16()(x.detach().bfloat16())
    assert half.dtype == torch.bfloat16
    # A token near a tie may go elsewhere in bf16; most do not.
    close = (half.float() - expected).abs() <= 0.05 * expected.abs().max()
    assert close.float().mean() > 0.9


def test_layers_have_their_own_numbers_and_start_from_the_family_s_own_values() -> None:
    _, model = built()
    first, second = (layer.mlp for layer in model.model.layers)
    assert [len(first.experts.gate_up_proj), len(second.experts.gate_up_proj)] == [2, 3]
    assert [first.gate.weight.shape[0], second.gate.weight.shape[0]] == [2, 3]
    assert first.experts.config is second.experts.config is model.config
    assert not first.coefficient.bias.any()
    assert 0.01 < first.coefficient.weight.std().item() < 0.04
    assert not hasattr(built(residual_expert=False)[1].model.layers[0].mlp, "coefficient")


def test_a_saved_folder_loads_again(tmp_path) -> None:
    _, model = built()
    model.save_pretrained(tmp_path)
    again = load_frozen(str(tmp_path))
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=0)


def test_numbers_that_do_not_fit_are_one_line() -> None:
    with pytest.raises(ConfigError, match="3 numbers for 2 layers"):
        build_on_meta(ModelConfig(config=tiny_config("pr_moe", num_experts_by_layer=[2, 3, 4])))
    with pytest.raises(ConfigError, match="adds up loads over layers"):
        build_on_meta(ModelConfig(config=tiny_config("pr_moe", output_router_logits=True)))
