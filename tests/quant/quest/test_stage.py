"""QuEST against its paper's formulas, written out; with a mask; in a model."""

import math

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.site import LinearSite
from leanmill.core.sites import Sites, iter_sites
from leanmill.kernels.hadamard.naive import hadamard_matrix
from leanmill.quant.quest.stage import HadamardWeight, QuestInput, QuestWeight
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from tests.core.tiny import install, loss_of, tiny, tokens


CLIP = {1: 0.79788, 2: 1.49353, 3: 2.05107, 4: 2.51393, 8: 3.88494}


def rotation(num_in, block_size):
    return torch.block_diag(*[hadamard_matrix(block_size)] * (num_in // block_size))


def rounded(rotated, num_bits):
    """Levels at (k + 1/2) step, the step from the RMS of the row; and who is trusted."""
    levels = 2**num_bits
    sigma = rotated.square().mean(-1, keepdim=True).sqrt()
    step = 2 * CLIP[num_bits] * sigma / (levels - 1)
    out = (torch.floor(rotated / step).clamp(-levels / 2, levels / 2 - 1) + 0.5) * step
    return out, (out - rotated).abs() <= step / 2 * (1 + 1e-12)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(4, 4), (2, 2), (1, 1), (8, 3), (4, None)])
def test_forward_and_gradients_are_the_papers(weight_bits, activation_bits, bias):
    num_in, num_out, block = 24, 10, 8
    layer = nn.Linear(num_in, num_out, bias=bias, dtype=torch.float64)
    model = nn.Sequential(layer)
    x = torch.randn(3, 5, num_in, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 5, num_out, dtype=torch.float64)
    h = rotation(num_in, block)
    w_q, w_trust = rounded(layer.weight.detach() @ h, weight_bits)
    x_h = x.detach() @ h
    x_q, x_trust = (x_h, torch.ones_like(x_h)) if activation_bits is None else rounded(x_h, activation_bits)
    expected = x_q @ w_q.T + (layer.bias if bias else 0)
    grad_x = ((upstream @ w_q) * x_trust) @ h.T
    grad_w = ((upstream.flatten(0, 1).T @ x_q.flatten(0, 1)) * w_trust) @ h.T

    sites = Sites(model)
    from leanmill.core.registry import parse_technique

    raw = {"type": "quest", "weight_bits": weight_bits, "activation_bits": activation_bits, "block_size": block}
    parse_technique(raw).install(sites, None)
    out = model(x)
    out.backward(upstream)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, grad_x)
    torch.testing.assert_close(model[0].weight.grad, grad_w)
    if bias:
        torch.testing.assert_close(model[0].bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_equals_the_fused_operation(dtype):
    from leanmill.kernels.hadamard.op import quest_quantise

    weight = torch.randn(7, 64).to(dtype)
    got = QuestWeight(4)(HadamardWeight(32)(weight.float()))
    torch.testing.assert_close(got, quest_quantise(weight.float(), 4, 32), rtol=1e-6, atol=1e-7)
    assert got.unique(dim=-1).shape[-1] <= 64


def test_a_mask_between_rotation_and_rounding_stays_exact_and_regrows():
    site = LinearSite.adopt(nn.Linear(32, 6), "a")
    for stage in (QuestWeight(4), NMSparsityStage(4, 8), HadamardWeight(16)):
        site.put(stage)
    weight = site.effective_weight()
    assert (weight.detach().reshape(-1, 8).count_nonzero(-1) == 4).all()
    weight.sum().backward()
    # A gradient of ones: pruned or kept, what is trusted gets 1, and the rotation spreads it.
    rotated = site.stages["rotate"](site.weight.detach())
    masked = site.stages["mask"](rotated)
    back = site.stages["rotate"](site.weight.grad)
    assert set(back.round(decimals=4).unique().tolist()) <= {0.0, 1.0}
    assert (back.round() == 1)[masked == 0].all(), "what is pruned must keep its gradient"


def test_fold_rotates_back_where_only_weights_are_rounded():
    model = tiny("mixtral")
    install(model, {"type": "quest", "weight_bits": 4, "activation_bits": None})
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        for _, site in list(iter_sites(model)):
            if isinstance(site, LinearSite):
                x = torch.randn(3, site.in_features)
                torch.testing.assert_close(site.fold()(x), site(x), rtol=1e-4, atol=1e-5)
        for _, site in list(iter_sites(model)):
            site.raw_weight.copy_(site.folded_weight())
            site.stages, site.inputs = nn.ModuleDict(), nn.ModuleDict()
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-4)


def test_experts_round_tokens_and_each_expert_by_itself():
    plain, model, ids = tiny("mixtral"), tiny("mixtral"), tokens()
    install(model, {"type": "quest", "weight_bits": 8, "activation_bits": 8, "targets": ["experts.*"]})
    loss_of(model, ids).backward()
    loss_of(plain, ids).backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        relative = (p.grad - q.grad).norm() / p.grad.norm()
        assert 0 < relative < 0.1, name


@pytest.mark.parametrize("block_size", [3, 64])
def test_a_block_that_does_not_fit_is_refused_with_what_to_type(block_size):
    with pytest.raises(ConfigError, match=r"block_size.*power of two up to 32.*quest\.exclude"):
        install(tiny(), {"type": "quest", "block_size": block_size, "targets": ["q_proj"]})


def test_rows_of_zeros_stay_zeros():
    assert not QuestWeight(2)(torch.zeros(3, 8)).any()
    assert math.isfinite(QuestInput(1, 8)(torch.zeros(2, 8)).sum())
