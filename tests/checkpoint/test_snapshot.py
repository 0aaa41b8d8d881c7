"""Parts of a tensor must fill it exactly once, and saying so is quick for those of 1,024 ranks."""

import itertools
import time

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from leanmill.checkpoint.snapshot import check_filled


def box(*dims):
    """Of (first, size) a dim."""
    return ChunkStorageMetadata(torch.Size(d[0] for d in dims), torch.Size(d[1] for d in dims))


def grid(shape, parts):
    cuts = [
        [(i * whole // number, whole // number) for i in range(number)]
        for whole, number in zip(shape, parts, strict=True)
    ]
    return [box(*dims) for dims in itertools.product(*cuts)]


@pytest.mark.parametrize("parts", [(1, 1), (4, 1), (1, 6), (2, 3)])
def test_grids_fill(parts):
    check_filled("weight", (8, 12), grid((8, 12), parts))


def test_single_numbers_and_empty_parts_fill():
    check_filled("step", (), [box()])
    check_filled("uneven", (3,), [box((0, 2)), box((2, 1)), box((3, 0)), box((3, 0))])
    check_filled("nothing", (0, 4), [box((0, 0), (0, 4))])


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([box((0, 4), (0, 12))], "parts have 48 elements"),
        ([box((0, 4), (0, 12)), box((5, 4), (0, 12))], "outside"),
        ([box((0, 4), (0, 12)), box((2, 4), (0, 12))], "overlap"),
        ([box((0, 8), (0, 6)), box((0, 4), (0, 12))], "overlap"),
    ],
)
def test_parts_that_do_not_fill_are_refused(boxes, message):
    with pytest.raises(ValueError, match=message):
        check_filled("weight", (8, 12), boxes)


def test_a_wide_weight_of_many_ranks_is_checked_at_once():
    boxes = grid((8192, 28672), (1024, 1))
    began = time.perf_counter()
    check_filled("down_proj.weight", (8192, 28672), boxes)
    # Pair by pair it takes a second and more, and a model has hundreds of such weights.
    assert time.perf_counter() - began < 0.2
