"""What every engine's rule views must fulfil, asked on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanmill.core.views import View
from leanmill.parallel.tensors import full


def put_together(view: View, piece: Tensor) -> Tensor:
    """The whole tensor from every rank's piece of it, by their indices; no element may be missing."""
    whole = torch.zeros(view.numel, dtype=torch.float64)
    held = torch.zeros(view.numel, dtype=torch.float64)
    index = view.index().flatten()
    whole[index] = piece.detach().double().flatten()
    held[index] = 1
    held, whole = view.reduce(held, "sum"), view.reduce(whole, "sum")
    assert torch.equal(held, torch.ones_like(held)), f"{view.name}: pieces overlap or leave a gap"
    return whole.view(view.piece.shape)


def trained(engine: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in engine.module.model.named_parameters() if p.requires_grad}


def check_gradients(engine: Any) -> None:
    """Between backward and clip: every gradient, and none afterwards."""
    gradients = dict(engine.gradients())
    assert gradients.keys() == trained(engine).keys()
    for name, parameter in trained(engine).items():
        view = engine.views.of(parameter)
        assert view.grad.shape == view.value.shape == view.index().shape
        assert torch.equal(put_together(view, view.grad), gradients[name].double()), name


def check_values_and_state(engine: Any) -> None:
    """Values and optimizer state by element, after a step."""
    state = {key: full(value) for key, value in engine.optimizer_state().items()}
    for name, parameter in engine.module.model.named_parameters():
        view = engine.views.named(name)
        assert engine.views.of(parameter).piece == view.piece
        if type(view).__name__ == "WholeView":
            assert torch.equal(view.value.double(), engine.full_parameter(name).double())
        else:
            assert torch.equal(put_together(view, view.value), engine.full_parameter(name).double()), name
        keys = {key.rpartition("/")[2] for key in state if key.rpartition("/")[0] == name}
        found = view.states()
        if view.value.numel():
            assert set(found) == {key for key in keys if state[f"{name}/{key}"].dim() > 0}, name
        for key in sorted(keys - {"step"}):
            piece = found.get(key, torch.zeros_like(view.value))
            assert torch.equal(put_together(view, piece), state[f"{name}/{key}"].double()), (name, key)
        assert view.grad is None, f"{name}: no gradient is there after the step"


def mask_gradients(engine: Any) -> dict[str, Tensor]:
    """Zero every third element of every gradient, by index of the whole; return the whole gradients left."""
    left = {}
    for name, gradient in engine.gradients():
        kept = (torch.arange(gradient.numel()) % 3 != 0).view(gradient.shape)
        left[name] = gradient.clone() * kept
        view = engine.views.named(name)
        view.grad.mul_(view.index() % 3 != 0)
    return left


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
