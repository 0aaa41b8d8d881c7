"""Rounding to nearest, written out, and as where `int_quant` begins."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.passes import InputStatistics
from leanmill.core.registry import parse_pass, parse_technique
from leanmill.core.sites import Sites


def solved(weight, **options):
    statistics = InputStatistics(num_tokens=0, square_sum=torch.zeros(weight.shape[1]), gram=None)
    return parse_pass({"type": "rtn", **options}).solver().prepare(statistics)(weight.clone()).weight


@pytest.mark.parametrize("group_size", [None, 6])
@pytest.mark.parametrize("bits", [2, 4])
def test_every_weight_is_at_its_nearest_level(bits, group_size):
    weight = torch.randn(300, 18, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    got = solved(weight, weight_bits=bits, group_size=group_size)
    for row, new in zip(weight[:8], got[:8], strict=True):
        for start in range(0, 18, group_size or 18):
            part = slice(start, start + (group_size or 18))
            levels = row[part].abs().max() / (2 ** (bits - 1) - 1) * torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))
            distances = (row[part, None] - levels).abs()
            torch.testing.assert_close((row[part] - new[part]).abs(), distances.amin(1), rtol=1e-5, atol=1e-6)
    assert not got[3].any()
    assert torch.equal(solved(got, weight_bits=bits, group_size=group_size), got) or bits == 4


def test_int_quant_begins_where_it_ends():
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(16, 12, bias=False)})
    with torch.no_grad():
        model.layer.weight.copy_(solved(model.layer.weight.detach(), weight_bits=4, group_size=8))
    written = model.layer.weight.detach().clone()
    raw = {"type": "int_quant", "weight_bits": 4, "granularity": "group", "group_size": 8}
    parse_technique(raw).install(Sites(model), None)
    torch.testing.assert_close(model.layer.effective_weight(), written, rtol=1e-6, atol=1e-7)


def test_groups_divide_rows():
    with pytest.raises(ConfigError, match="group_size 64 does not divide"):
        parse_pass({"type": "rtn", "group_size": 64}).check_shape_of("layer", (4, 96))
