"""Which layers share their inputs, and what their statistics are."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.core.errors import RunError
from leanmill.trainer.passes.statistics import check_reached, watched
from tests.distributed import run_ranks


class Block(nn.Module):
    """Two layers on one input, one on another, one that few rows reach."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.out, self.rare = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, *, rare=True, shared=True):
        y = self.left(x) + self.right(x if shared else x.clone())
        return self.out(y) + (self.rare(y.relu()) if rare else 0)


def named(block):
    return dict(block.named_children())


def test_layers_called_with_one_tensor_share_its_sums():
    block, rows = Block(), [torch.randn(2, 3, 6) for _ in range(3)]
    with watched(named(block), with_gram=True) as watches:
        for x in rows:
            block(x)
    assert [watch.names for watch in watches] == [["left", "right"], ["out"], ["rare"]]
    check_reached(named(block), watches)
    x = torch.cat(rows).flatten(0, 1)
    total = watches[0].total()
    assert total.num_tokens == 18
    torch.testing.assert_close(total.square_sum, x.square().sum(0))
    torch.testing.assert_close(total.gram.tiles[0, 0], x.T @ x)


def test_layers_that_part_later_are_refused():
    block = Block()
    with watched(named(block), with_gram=False):
        block(torch.randn(2, 6))
        with pytest.raises(RunError, match="right and left share .* exclude"):
            block(torch.randn(2, 6), shared=False)


def test_a_layer_that_only_one_rank_reaches_is_refused_on_all():
    def body():
        block = Block()
        with watched(named(block), with_gram=False) as watches:
            block(torch.randn(2, 6), rare=dist.get_rank() == 0)
        with pytest.raises(RunError, match="no calibration row of a rank reaches rare"):
            check_reached(named(block), watches)
        return True

    assert run_ranks(body, 2) == [True, True]


def test_inputs_that_are_not_finite_are_refused():
    block = Block()
    with watched(named(block), with_gram=False) as watches:
        block(torch.full((2, 6), torch.inf))
    with pytest.raises(RunError, match="inputs of left are not finite"):
        watches[0].total()
