"""Choosing weights, blocks, rows and columns on pieces that are cut anywhere: the masks of one process."""

import pytest
import torch
import torch.distributed as dist

from leanmill.core.errors import ConfigError
from leanmill.core.views import Box, Span
from leanmill.sparse.units import Scored, Unit, choose
from tests.core.test_selection import Piece
from tests.distributed import run_ranks


SHAPES = [(6, 10), (2, 4, 5)]
UNITS = [Unit("weight"), Unit("block", (2, 5)), Unit("row"), Unit("column")]
CUTS = [[0, 13, 13, 60], [0, 0, 27, 40]]
"""Three ranks; pieces end inside blocks, rows and columns, and some have nothing."""


class Held(Piece):
    """A piece with values."""

    def __init__(self, piece, value):
        super().__init__(piece)
        self._value = value

    @property
    def value(self):
        return self._value


class Alone(Held):
    """All of it."""

    def reduce(self, tensor, op):
        return tensor


def _layers(kind, cut):
    generator = torch.Generator().manual_seed(3)
    layers = []
    for shape, edges in zip(SHAPES, CUTS, strict=True):
        score = torch.rand(shape, generator=generator)
        score = (score * 3).round() if kind == "ties" else score
        score = score - 0.5 if kind == "signed" else score
        mask = torch.rand(shape, generator=generator) < 0.9
        if cut is None:
            whole = Box(shape, (0,) * len(shape), shape)
            layers.append(Scored(Alone(whole, score), Alone(whole, mask), score * mask))
            continue
        start, stop = edges[cut], edges[cut + 1]
        piece = Span(shape, start, stop)
        part = (score * mask).flatten()[start:stop]
        layers.append(Scored(Held(piece, part), Held(piece, mask.flatten()[start:stop]), part))
    return layers


def _on_ranks():
    rank = dist.get_rank()
    for kind in ("random", "ties", "signed"):
        is_signed = kind == "signed"
        for unit in UNITS:
            for scope in ("layer", "global"):
                whole = choose(_layers(kind, None), unit, 0.4, scope, is_signed=is_signed)
                got = choose(_layers(kind, rank), unit, 0.4, scope, is_signed=is_signed)
                for mask, part, edges in zip(whole, got, CUTS, strict=True):
                    assert torch.equal(part, mask.flatten()[edges[rank] : edges[rank + 1]]), (kind, unit, scope)
    return True


def test_pieces_on_three_ranks():
    assert all(run_ranks(_on_ranks, 3))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.kind)
def test_units_cover_a_weight_evenly(unit):
    for shape in SHAPES:
        if unit.kind == "block" and shape[-1] % 5:
            continue
        numel = torch.Size(shape).numel()
        numbers = unit.numbers(shape, torch.arange(numel))
        counts = numbers.bincount()
        assert len(counts) == unit.count(shape)
        assert (counts == numel // len(counts)).all()
        for number in range(len(counts)):
            places = (numbers == number).nonzero().flatten()
            matrix = shape[-2] * shape[-1]
            assert len({int(place) // matrix for place in places}) == 1, "no unit reaches into another expert"


def test_blocks_that_do_not_divide_are_refused():
    with pytest.raises(
        ConfigError, match=r"w: blocks of 4 x 5 do not divide its weight \[6, 10\]; add 'w' to x.exclude"
    ):
        Unit("block", (4, 5)).check("w", (6, 10), "x")
