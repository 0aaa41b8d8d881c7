"""Gram matrices in tiles against whole ones."""

import pytest
import torch

from leanmill.core import gram as gram_module
from leanmill.core.gram import Gram


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(gram_module, "TILE", 8)


def whole(gram):
    return gram.permuted(torch.arange(gram.size))._rows(torch.arange(gram.size))


@pytest.mark.parametrize("size", [1, 8, 21])
def test_sums_energies_and_permutations_are_those_of_the_whole_matrix(size):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, size, generator=generator)
    gram = Gram(size)
    gram.add(rows[:13])
    gram.add(rows[13:])
    expected = rows.T @ rows
    torch.testing.assert_close(whole(gram), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole(Gram.of(expected)), expected, rtol=0, atol=0)
    torch.testing.assert_close(gram.diagonal(), expected.diagonal(), rtol=1e-5, atol=1e-5)
    weight = torch.randn(4, size, generator=generator)
    assert gram.energy(weight) == pytest.approx((weight @ rows.T).square().sum().item(), rel=1e-4)
    order = torch.randperm(size, generator=generator)
    torch.testing.assert_close(whole(gram.permuted(order)), expected[order][:, order], rtol=1e-5, atol=1e-5)
    gram.reduce(lambda tile: 2 * tile)
    torch.testing.assert_close(whole(gram), 2 * expected, rtol=1e-5, atol=1e-5)


def test_only_half_is_kept():
    held = sum(tile.numel() for tile in Gram(80).tiles.values())
    assert held == 80 * (80 + 8) // 2
