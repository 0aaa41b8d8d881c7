"""What is said of a checkpoint that does not fit."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from leanmill.checkpoint.compare import compare
from leanmill.checkpoint.reading import StoredTensor


def _stored(**shapes: tuple[int, ...]) -> dict[str, StoredTensor]:
    return {name.replace("__", "."): StoredTensor(torch.float32, shape, ()) for name, shape in shapes.items()}


def test_rounded_moments_of_other_ranks_are_refused_with_what_to_do() -> None:
    live: dict[str, Tensor] = {"up/exp_avg.qmap": torch.zeros(4, 256), "up/exp_avg.scale": torch.zeros(4, 16)}
    stored = _stored(**{"up/exp_avg__qmap": (2, 256), "up/exp_avg__scale": (2, 32)})
    said = compare(stored, live, Path("run/optimizer"))
    assert "2 different (up/exp_avg.qmap [2, 256] float32 in the checkpoint, [4, 256] float32 here" in said
    assert "goes on under the engine and on the number of ranks it was written with" in said
    assert "leanmill export" in said
    plain = compare(_stored(**{"up/exp_avg": (2, 3)}), {"up/exp_avg": torch.zeros(3, 2)}, Path("run/optimizer"))
    assert "recipe saved beside it" in plain
