"""Frozen weights in fewer bytes: values by the formulas, and gradients of what trains on top of them."""

import pytest
import torch
from torch import nn

from leanmill.core.compact import BLOCK, Compact
from leanmill.core.normal_float import normal_float_levels
from leanmill.core.site import EmbeddingSite, LinearSite
from leanmill.core.stage import Slot
from leanmill.peft_ext.lora.stage import LoraStage
from leanmill.quant.grids import UniformGrid
from leanmill.quant.sharing import Sharing
from leanmill.quant.stages import LearnedScale


CODES = ["int8", "int4", "int2", "nf4", "nf3", "nf2"]
SHAPES = [(3, 64), (2, 3, 70), (5, 1), (2, 129)]


def compact_of(weight, kind, dtype=torch.float32):
    """The parameter and its decoder, filled."""
    stage = Compact(weight.shape, kind, dtype, weight.device)
    kept = stage.empty(weight.device)
    if stage.has_codes:
        stage.assign_encoded(kept, weight, lambda target, value: target.copy_(value))
    else:
        kept.copy_(weight)
    return kept, stage


def written_out(row, kind):
    """One row by the definition, an element at a time."""
    size = len(row) if kind == "int8" else BLOCK
    found = []
    for first in range(0, len(row), size):
        block = row[first : first + size]
        largest = max(abs(float(x)) for x in block)
        if kind in ("int2", "nf3", "nf2"):
            largest = float(torch.tensor(largest).bfloat16())
        for x in block:
            relative = float(x) / largest if largest else 0.0
            if kind.startswith("nf"):
                levels = normal_float_levels(int(kind[-1]))
                found.append(largest * min(levels, key=lambda level: abs(level - relative)))
            else:
                top = {"int8": 127, "int4": 7, "int2": 1}[kind]
                found.append(largest / top * round(relative * top))
    return torch.tensor(found)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_nearest_levels(kind, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight.view(-1, shape[-1])[-1] = 0
    kept, stage = compact_of(weight, kind)
    expected = torch.stack([written_out(row, kind) for row in weight.view(-1, shape[-1])]).view(shape)
    torch.testing.assert_close(stage(kept), expected, rtol=1e-6, atol=1e-7)
    bits = int(kind[-1])
    assert kept.shape[-1] == sum(-(-shape[-1] * part // 8) for part in ((2, 1) if bits == 3 else (bits,)))
    in_bits = 8 * (kept.nbytes + stage.scale.nbytes) / weight.numel()
    assert stage.bits_a_weight == in_bits


def test_rows_are_encoded_by_themselves():
    weight = torch.randn(6, 70)
    for kind in CODES:
        stage = Compact(weight.shape, kind, torch.float32, weight.device)
        whole, parts = stage.encode(weight), [stage.encode(weight[rows]) for rows in (slice(0, 4), slice(4, 6))]
        for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
            assert torch.equal(value, torch.cat(pieces))


def site_on(weight, kind, dtype):
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    site = LinearSite.adopt(layer, "proj")
    kept, stage = compact_of(weight, kind, dtype)
    site.weight = nn.Parameter(kept, requires_grad=False)
    site.put(stage)
    return site


@pytest.mark.parametrize("kind", ["bf16", *CODES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounds", [False, True])
def test_gradients_are_those_of_the_decoded_weight_and_nothing_of_its_size_is_kept(kind, dtype, rounds):
    torch.manual_seed(0)
    weight = torch.randn(96, 70)
    site = site_on(weight, kind, torch.float32)
    lora = LoraStage(weight, 3, 0.5)
    nn.init.normal_(lora.lora_B)
    site.put(lora)
    grid = LearnedScale(weight, UniformGrid(4, "signed"), Sharing("row"))
    if rounds:
        nn.init.constant_(grid.scale, 0.3)
        site.put(grid)
    site.bias = nn.Parameter(site.bias.detach().to(dtype))  # as engines that compute in it have it
    tokens = torch.randn(5, 70, dtype=dtype, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = site(tokens)
    stored = site.weight.numel()
    # The stored weight itself may be kept, a merged, decoded or rounded one may not.
    assert all(size < weight.numel() or size == stored for size in kept)
    out.float().square().sum().backward()

    plain = tokens.detach().clone().requires_grad_(True)
    a, b = (p.detach().clone().requires_grad_(True) for p in (lora.lora_A, lora.lora_B))
    decoded = site.stages[Slot.COMPACT.key].decode(site.weight, torch.float32)
    merged = decoded + 0.5 * b @ a
    if rounds:
        scaled = merged / 0.3
        inside = (scaled > -8) & (scaled < 7)
        rounded = scaled.clamp(-8, 7).round() * 0.3
        merged = torch.where(inside, merged + (rounded - merged).detach(), rounded.detach())
    expected = nn.functional.linear(plain, merged.to(dtype), site.bias.to(dtype))
    expected.float().square().sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 2.0}
    torch.testing.assert_close(out, expected, **(close if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.3}))
    for got, wanted in zip((tokens, lora.lora_A, lora.lora_B), (plain, a, b), strict=True):
        scale = float(wanted.grad.float().norm())
        assert (
            float((got.grad.float() - wanted.grad.float()).norm()) <= (1e-4 if dtype == torch.float32 else 2e-2) * scale
        )


def test_a_plain_compact_layer_keeps_its_codes_only():
    weight = torch.randn(96, 128)
    site = site_on(weight, "nf4", torch.float32)
    tokens = torch.randn(4, 128, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        out = site(tokens)
    assert max(kept, default=0) <= site.weight.numel()
    out.sum().backward()
    decoded = site.effective_weight()
    torch.testing.assert_close(tokens.grad, decoded.sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)
    assert torch.equal(site.fold()(tokens), out)


def test_a_table_decodes_the_rows_that_are_looked_up():
    table = EmbeddingSite.adopt(nn.Embedding(50, 8), "embed")
    kept, stage = compact_of(torch.randn(50, 8), "bf16")
    table.weight = nn.Parameter(kept, requires_grad=False)
    table.put(stage)
    seen = []
    stage.register_forward_hook(lambda module, given, out: seen.append(tuple(given[0].shape)))
    assert torch.equal(table(torch.tensor([3, 7])), kept[[3, 7]].float())
    assert seen == [(2, 8)]
