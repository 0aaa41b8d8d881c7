"""What docs/techniques/index.md says of masking after quantising."""

import pytest
import torch

from leanmill.kernels.nm_mask.op import nm_mask, nm_project
from leanmill.kernels.ternary.op import ternary


@pytest.mark.parametrize(("rule", "share"), [("absmean", 0.46), ("twn", 0.31), ("mse", 0.27)])
def test_quantise_then_mask_keeps_other_entries(rule, share):
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    largest = nm_mask(weight, 2, 4).unflatten(-1, (-1, 4))
    kept = (nm_project(ternary(weight, rule), 2, 4) != 0).unflatten(-1, (-1, 4))
    assert kept.sum(-1).max() == 2
    assert (kept & ~largest).any(-1).float().mean().item() == pytest.approx(share, abs=0.01)
