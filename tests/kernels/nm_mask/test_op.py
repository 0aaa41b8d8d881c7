"""The N:M mask against its definition, on values that break ties, sign and NaN handling."""

import math

import pytest
import torch

from leanmill.kernels.nm_mask import cpu
from leanmill.kernels.nm_mask.naive import nm_mask_by_rank, nm_mask_by_sort
from leanmill.kernels.nm_mask.op import nm_mask


PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (1, 8), (5, 8), (7, 8), (2, 3), (3, 5), (4, 16), (31, 64), (1, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def by_hand(weight, num_kept, group_size):
    """The definition, one group at a time: sort by (NaN first, larger magnitude first, lower index first)."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    values = weight.double().reshape(-1, group_size).tolist()
    flat = mask.view(-1, group_size)
    for row, group in enumerate(values):
        order = sorted(range(group_size), key=lambda i: (not math.isnan(group[i]), -abs(group[i]), i))
        flat[row, order[:num_kept]] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size"), PATTERNS)
def test_equals_the_definition(num_kept, group_size, dtype):
    # Few distinct values, so that most groups have ties, of both signs and with both zeros.
    weight = torch.randint(-3, 4, (3, 5, group_size * 3)).to(dtype) * 0.5
    weight[0, :2] *= -1
    expected = by_hand(weight, num_kept, group_size)
    for function in (nm_mask, nm_mask_by_sort, nm_mask_by_rank):
        assert torch.equal(function(weight, num_kept, group_size), expected), function.__name__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size"), [(2, 4), (1, 2), (3, 8), (2, 5)])
def test_random_weights_of_odd_shapes(num_kept, group_size, dtype):
    for shape in ((1, group_size), (7, 3 * group_size), (2, 3, 11 * group_size), (group_size,), (0, group_size)):
        weight = torch.randn(shape).to(dtype)
        mask = nm_mask(weight, num_kept, group_size)
        assert torch.equal(mask, nm_mask_by_sort(weight, num_kept, group_size))
        assert (mask.view(-1, group_size).sum(-1) == num_kept).all()


@pytest.mark.parametrize("group_size", [2, 4, 5, 8])
def test_nan_infinity_and_negative_zero(group_size):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, -float("nan")])
    weight = special[torch.randint(8, (64, group_size * 4))]
    for num_kept in range(1, group_size):
        expected = by_hand(weight, num_kept, group_size)
        for function in (nm_mask, nm_mask_by_sort, nm_mask_by_rank):
            assert torch.equal(function(weight, num_kept, group_size), expected), function.__name__


def test_neighbours_apart_by_one_unit_in_the_last_place_are_told_apart():
    one = torch.tensor(1.0)
    up = torch.nextafter(one, torch.tensor(2.0))
    weight = torch.stack([one, -up, one, -one]).repeat(5, 3)
    assert torch.equal(nm_mask(weight, 1, 4), (torch.arange(12) % 4 == 1).expand(5, 12))


def test_non_contiguous_weights():
    weight = torch.randn(16, 24).t()
    assert not weight.is_contiguous()
    assert torch.equal(nm_mask(weight, 2, 4), nm_mask_by_sort(weight.contiguous(), 2, 4))
    sliced = torch.randn(6, 32)[:, 4:24]
    assert torch.equal(nm_mask(sliced, 3, 4), nm_mask_by_sort(sliced, 3, 4))


def test_the_fast_path_covers_what_it_should_and_leaves_the_weight_alone():
    weight = torch.randn(3, 8)
    before = weight.clone()
    assert cpu.is_supported(weight, 4)
    assert cpu.is_supported(torch.nn.Parameter(weight), 8)
    assert not cpu.is_supported(weight, 16)
    assert not cpu.is_supported(weight.to("meta"), 4)
    nm_mask(weight, 2, 4)
    assert torch.equal(weight, before)


def test_meta_weights_get_a_mask_of_their_shape():
    assert nm_mask(torch.empty(3, 8, device="meta"), 2, 4).shape == (3, 8)
