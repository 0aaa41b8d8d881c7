"""Definitions of the N:M operations against rules written out by hand."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanmill.kernels.nm_mask import naive


PATTERNS = [
    (1, 2),
    (2, 4),
    (1, 4),
    (3, 4),
    (1, 8),
    (5, 8),
    (7, 8),
    (2, 3),
    (3, 5),
    (4, 16),
    (31, 64),
    (1, 64),
    (8, 128),
    (200, 256),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SPECIAL = [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]


def by_hand(weight, num_kept, group_size):
    """The definition, one group at a time: sort by (NaN first, larger magnitude first, lower index first)."""
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    values = weight.double().reshape(-1, group_size).tolist()
    flat = mask.view(-1, group_size)
    for row, group in enumerate(values):
        order = sorted(range(group_size), key=lambda i: (not math.isnan(group[i]), -abs(group[i]), i))
        flat[row, order[:num_kept]] = True
    return mask


def all_tile_masks():
    """Every 4 x 4 mask with two in each row and column, by trying all."""
    rows = list(itertools.combinations(range(4), 2))
    masks = []
    for choice in itertools.product(rows, repeat=4):
        mask = torch.zeros(4, 4, dtype=torch.bool)
        for row, columns in enumerate(choice):
            mask[row, list(columns)] = True
        if (mask.sum(0) == 2).all():
            masks.append(mask)
    return masks


def best_tile_by_hand(tile):
    """The first mask of the largest sum, for tiles whose sums are exact in any order."""
    return max(all_tile_masks(), key=lambda mask: tile.double().abs()[mask].sum().item())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_kept", "group_size"), PATTERNS)
def test_masks_equal_the_rule(num_kept, group_size, dtype):
    # Few distinct values, so that most groups have ties, of both signs and with both zeros.
    weight = torch.randint(-3, 4, (3, 5, group_size * 3)).to(dtype) * 0.5
    weight[0, :2] *= -1
    expected = by_hand(weight, num_kept, group_size)
    for function in (naive.nm_mask_by_sort, naive.nm_mask_by_rank):
        assert torch.equal(function(weight, num_kept, group_size), expected), function.__name__


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [2, 4, 5, 8])
def test_nan_infinity_and_negative_zero(group_size, dtype):
    weight = torch.tensor(SPECIAL)[torch.randint(8, (64, group_size * 4))].to(dtype)
    for num_kept in range(1, group_size):
        expected = by_hand(weight, num_kept, group_size)
        for function in (naive.nm_mask_by_sort, naive.nm_mask_by_rank):
            assert torch.equal(function(weight, num_kept, group_size), expected), function.__name__


def test_there_are_90_transposable_patterns_in_lexicographic_order():
    expected = torch.stack(all_tile_masks())
    assert len(expected) == 90
    assert torch.equal(naive.tile_pattern_masks(torch.device("cpu")), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [1, 2, 50])
def test_transposable_masks_are_the_first_best_of_all(largest, dtype):
    weight = torch.randint(-largest, largest + 1, (2, 8, 12)).to(dtype)
    mask = naive.tile_mask(weight)
    for e, i, j in itertools.product(range(2), range(0, 8, 4), range(0, 12, 4)):
        expected = best_tile_by_hand(weight[e, i : i + 4, j : j + 4])
        assert torch.equal(mask[e, i : i + 4, j : j + 4], expected)


def test_transposable_masks_of_special_values_still_keep_two():
    weight = torch.tensor(SPECIAL)[torch.randint(8, (16, 16))]
    tiles = naive.tile_mask(weight).view(4, 4, 4, 4)
    assert (tiles.sum(1) == 2).all()
    assert (tiles.sum(3) == 2).all()
    # Everything infinite: all sums tie and the first pattern stays.
    first = naive.tile_mask(torch.full((4, 4), float("nan")))
    assert torch.equal(first, all_tile_masks()[0])


@pytest.mark.parametrize(("num_kept", "group_size"), PATTERNS)
@given(st.integers(0, 3), st.integers(0, 5), st.sampled_from(DTYPES))
@settings(max_examples=10, deadline=None)
def test_compressed_form_round_trips(num_kept, group_size, num_rows, num_groups, dtype):
    weight = torch.randn(num_rows, 2, num_groups * group_size).to(dtype)
    values, indices = naive.compress(weight, num_kept, group_size)
    assert values.shape == (num_rows, 2, num_groups * num_kept)
    projected = naive.project(weight, num_kept, group_size, False)
    assert torch.equal(naive.expand(values, indices, num_kept, group_size), projected)
    assert torch.equal(naive.gather(weight, indices, num_kept, group_size), values)


def test_packed_indices_are_laid_out_as_stated():
    weight = torch.tensor([[0.0, 3.0, 2.0, 0.0, 5.0, 0.0, 0.0, 4.0, 9.0, 0.0, 8.0, 0.0]])
    values, indices = naive.compress(weight, 2, 4)
    assert values.tolist() == [[3.0, 2.0, 5.0, 4.0, 9.0, 8.0]]
    assert indices.tolist() == [[1 | 2 << 2 | 0 << 4 | 3 << 6, 0 | 2 << 2]]
    for group_size, num_bytes in ((2, 1), (4, 2), (16, 3), (64, 6)):
        assert naive.packed_width(6, group_size) == num_bytes
