"""Selecting the largest by counting digits, against sorting: with ties, and on pieces cut anywhere."""

import math

import pytest
import torch
import torch.distributed as dist

from leanmill.core.selection import distinct_keys, kth_largest, largest, largest_of_all
from leanmill.core.views import Box, Span, View
from leanmill.parallel.collectives import reduced
from tests.distributed import run_ranks


AWKWARD = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0000001]


def test_keys_have_the_order_of_values_and_then_of_the_index():
    values = torch.tensor(AWKWARD + AWKWARD)
    keys = distinct_keys(values, torch.arange(len(values)))
    by_key = keys.argsort(descending=True).tolist()
    by_value = sorted(range(len(values)), key=lambda i: (-values[i].item(), i))
    assert by_key == by_value
    assert keys.unique().numel() == len(values)
    assert keys.min() > 0


def test_what_is_no_number_comes_first():
    keys = distinct_keys(torch.tensor([1.0, math.nan, 3e38]), torch.arange(3))
    assert keys.argmax() == 1


def test_an_index_beyond_31_bits_still_tells_neighbours_apart():
    index = 2**40 - 2 + torch.arange(4)
    assert distinct_keys(torch.zeros(4), index).unique().numel() == 4


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1000,)])
def test_the_kth_largest_is_that_of_a_sort(shape):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(2**62, shape, generator=generator)
    keys.view(-1)[::3] >>= 40  # long runs of equal leading digits
    for k in {1, keys.numel() // 2 + 1, keys.numel()}:
        expected = keys.flatten().sort(descending=True).values[k - 1]
        assert kth_largest(keys, torch.tensor(k)) == expected


def test_ranks_find_the_kth_largest_of_all_from_counts():
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randint(2**62, (n,), generator=generator) for n in (5, 0, 11)]
    whole, k = torch.cat(parts), torch.tensor(6)
    seen = []
    kth_largest(whole, k, lambda counts: (seen.append(counts), counts)[1])
    shares = [[] for _ in parts]
    for part, share in zip(parts, shares, strict=True):
        everyone = iter(seen)  # what a sum over ranks would give each of them
        found = kth_largest(part, k, lambda counts, s=share, e=everyone: (s.append(counts), next(e))[1])
        assert found == whole.sort(descending=True).values[k - 1]
    assert all(torch.equal(sum(s[:257] for s in step), total) for *step, total in zip(*shares, seen, strict=True))


def _by_sorting(score, count, among=None):
    """A stable sort keeps equal scores in the order of their index."""
    ranked = score.abs().flatten().clone()
    if among is not None:
        ranked[~among.flatten()] = -1
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[ranked.argsort(descending=True, stable=True)[:count]] = True
    return mask.view(score.shape)


def _scores(kind, shape, generator):
    if kind == "normal":
        return torch.randn(shape, generator=generator).abs()
    if kind == "few levels":
        return torch.randint(4, shape, generator=generator) / 4
    if kind == "zeros":
        return torch.zeros(shape)
    return torch.rand(shape, generator=generator) * 10.0 ** torch.randint(-44, 38, shape, generator=generator)


KINDS = ("normal", "few levels", "zeros", "all magnitudes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (7, 5), (3, 11, 6), (4099,)])
def test_whole(kind, shape):
    generator = torch.Generator().manual_seed(1)
    score = _scores(kind, shape, generator)
    among = torch.rand(shape, generator=generator) < 0.6
    among.view(-1)[0] = True
    for count in {0, 1, score.numel() // 3, score.numel()}:
        assert torch.equal(largest(score, count), _by_sorting(score, count))
    for count in {0, 1, int(among.sum()) // 2, int(among.sum())}:
        assert torch.equal(largest(score, count, among=among), _by_sorting(score, count, among))


def test_zeros_of_both_signs_are_equal():
    assert largest(torch.tensor([-0.0, 0.0, -0.0]), 2).tolist() == [True, True, False]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_both_signs(kind):
    generator = torch.Generator().manual_seed(4)
    score = _scores(kind, (7, 5), generator) * torch.randint(-1, 2, (7, 5), generator=generator)
    score.view(-1)[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    among = torch.rand(7, 5, generator=generator) < 0.6
    ranked = score.double().nan_to_num(nan=1e301, posinf=1e300, neginf=-1e300).masked_fill(~among, -1e302).flatten()
    for count in {1, int(among.sum()) // 2, int(among.sum())}:
        expected = torch.zeros(35, dtype=torch.bool)
        expected[ranked.argsort(descending=True, stable=True)[:count]] = True
        (found,) = largest_of_all([score], count, among=[among], is_signed=True)
        assert torch.equal(found, expected.view(7, 5))


def test_too_many():
    with pytest.raises(ValueError, match="3 elements asked for, and only 2 may be taken"):
        largest(torch.rand(4), 3, among=torch.tensor([True, False, True, False]))


class Piece(View):
    """A piece cut at given elements, or every other column."""

    grad, name = None, "piece"

    def __init__(self, piece):
        self.piece = piece

    @property
    def value(self):
        return torch.empty(0)

    def states(self):
        return {}

    def reduce(self, tensor, op):
        return reduced(tensor, op)

    def beside(self, parameter):
        raise NotImplementedError


CUTS = [0, 13, 13, 35]
"""Three ranks: the first cut is within a row, the second has nothing."""


def _on_ranks():
    rank, generator = dist.get_rank(), torch.Generator().manual_seed(2)
    for kind in KINDS:
        score = _scores(kind, (5, 7), generator)
        among = torch.rand(5, 7, generator=generator) < 0.7
        count = int(among.sum()) // 2
        expected = _by_sorting(score, count, among)
        span = slice(CUTS[rank], CUTS[rank + 1])
        columns = [slice(0, 1), slice(1, 6), slice(6, 7)][rank]
        pieces = [
            (Span((5, 7), span.start, span.stop), lambda whole, s=span: whole.flatten()[s]),
            (Box((5, 7), (0, columns.start), (5, columns.stop - columns.start)), lambda whole, c=columns: whole[:, c]),
        ]
        for piece, cut in pieces:
            got = largest(cut(score), count, among=cut(among), view=Piece(piece))
            assert torch.equal(got, cut(expected)), (kind, piece)
            # Beside another tensor of the same values, which comes first among equals.
            both = _by_sorting(torch.cat([score, score]), count, torch.cat([among, among])).split(5)
            views = [Piece(piece), Piece(piece)]
            found = largest_of_all([cut(score)] * 2, count, among=[cut(among)] * 2, views=views)
            assert all(torch.equal(mask, cut(want)) for mask, want in zip(found, both, strict=True)), (kind, piece)
    return True


def test_pieces_on_three_ranks():
    assert all(run_ranks(_on_ranks, 3))
