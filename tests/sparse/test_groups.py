"""N:M masks on pieces that cut through groups and tiles: the mask of the whole."""

import pytest
import torch
import torch.distributed as dist

from leanmill.core.views import Box, Span
from leanmill.kernels.nm_mask.op import nm_mask
from leanmill.sparse.groups import PieceMasks
from tests.distributed import run_ranks
from tests.sparse.test_units import Alone, Held


SHAPE = (2, 8, 12)
EDGES = [0, 7, 7, 58, 192]
"""Of spans on four ranks; one has nothing, and the others end inside groups and tiles."""
CUTS = {0: [0, 1, 1, 1, 2], 1: [0, 3, 3, 6, 8], 2: [0, 2, 2, 5, 12]}
"""Of boxes, by dim."""
PATTERNS = [(2, 4, False), (1, 3, False), (5, 12, False), (2, 4, True)]


def _weight():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def _pieces(rank):
    """Pairs of a piece and what makes it of a whole."""
    start, stop = EDGES[rank], EDGES[rank + 1]
    yield Span(SHAPE, start, stop), lambda whole: whole.flatten()[start:stop]
    for dim, cuts in CUTS.items():
        first, size = cuts[rank], cuts[rank + 1] - cuts[rank]
        offsets, sizes = [0, 0, 0], list(SHAPE)
        offsets[dim], sizes[dim] = first, size
        piece = Box(SHAPE, tuple(offsets), tuple(sizes))
        yield piece, lambda whole, d=dim, f=first, s=size: whole.narrow(d, f, s)


def _on_ranks():
    for num_kept, group_size, transposable in PATTERNS:
        whole = nm_mask(_weight(), num_kept, group_size, transposable=transposable)
        for piece, cut in _pieces(dist.get_rank()):
            masks = PieceMasks(transposable=transposable)
            for _ in range(2):
                got = masks.of(Held(piece, cut(_weight())), num_kept, group_size)
                assert torch.equal(got, cut(whole)), (num_kept, group_size, transposable, piece)
    return True


def test_pieces_on_four_ranks():
    assert all(run_ranks(_on_ranks, 4))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_alone(pattern):
    num_kept, group_size, transposable = pattern
    weight = _weight()
    view = Alone(Box(SHAPE, (0, 0, 0), SHAPE), weight)
    got = PieceMasks(transposable=transposable).of(view, num_kept, group_size)
    assert torch.equal(got, nm_mask(weight, num_kept, group_size, transposable=transposable))


def test_the_value_is_rounded_as_forward_rounds_it():
    weight = torch.tensor([[1.0, 1.001, 0.0, 0.5]])
    view = Alone(Box((1, 4), (0, 0), (1, 4)), weight)
    assert PieceMasks().of(view, 1, 4).tolist() == [[False, True, False, False]]
    assert PieceMasks().of(view, 1, 4, torch.bfloat16).tolist() == [[True, False, False, False]]
