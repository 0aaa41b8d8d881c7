"""The smallest engine that has a state to save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leanmill.parallel.engine import Engine


class FakeEngine(Engine):
    """Holds named tensors; `load_*` checks that it is given what `*_state` handed out."""

    def __init__(self, model: dict[str, Tensor], optimizer: dict[str, Tensor] | None = None) -> None:
        self.model = model
        self.optimizer = {} if optimizer is None else optimizer

    def model_state(self) -> dict[str, Tensor]:
        return dict(self.model)

    def optimizer_state(self) -> dict[str, Tensor]:
        return dict(self.optimizer)

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        assert state.keys() == self.model.keys()
        self.model = dict(state)

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        assert state.keys() == self.optimizer.keys()
        self.optimizer = dict(state)

    def _unused(self, *_: Any) -> Any:
        raise NotImplementedError

    prepare = forward_backward = clip = step = evaluate = gradients = full_parameter = prepare_frozen = close = _unused
    set_trainable = _look = _unused
    param_groups = views = property(_unused)  # type: ignore[assignment]


def odd_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every dtype and shape that makes trouble."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "model.embed.weight": draw(7, 5),
        "model.half.weight": draw(5, 3).bfloat16(),
        "model.mask": draw(6, 4) > 0,
        "model.count": torch.randint(0, 1 << 40, (3,), generator=generator),
        "model.scalar": draw(),
        "model.one": draw(1),
        "model.short": draw(2, 2),
        "model.experts": draw(3, 2, 5).double(),
        "model.transposed": draw(4, 6).t(),
        "model.empty": draw(0, 4),
        "model.byte": torch.arange(9, dtype=torch.uint8),
    }


def zeros_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Same names, shapes and dtypes, nothing of the values."""
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bitwise equal, dtypes included."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].shape == b[name].shape and torch.equal(a[name], b[name])
        for name in a
    )
