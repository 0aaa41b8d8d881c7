"""Block-wise local distillation: each alternative alone learns what the layer it may stand in puts out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.surgery import SeenBlock
from leanmill.sparse.puzzle.alternatives import PartName, belongs


@dataclass(frozen=True, kw_only=True)
class Call:
    """A layer called with one batch."""

    hidden: Tensor
    """[B, S, H] on the CPU."""
    arguments: Mapping[str, Any]
    wanted: Tensor
    """What it put out, likewise."""


@dataclass(frozen=True, kw_only=True)
class SeenLayer:
    """What calibration showed of a layer."""

    calls: Sequence[Call]
    """Of this rank."""
    contributions: Tensor
    """Of neurons, on the CPU [neurons] fp32: the mean of |a_i| over tokens times the norm of the column of the down
    projection that reads it."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What became of an alternative."""

    tensors: dict[str, Tensor]
    """By name relative to the layer, on the CPU, in the dtype the model stores."""
    error: float
    """`normalised_mse` in the last epoch."""


def normalised_mse(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the squared error over that of nothing, sums over all of a batch: MSE(found, wanted) / MSE(0, wanted)."""
    tiny = torch.finfo(wanted.dtype).tiny
    return (found - wanted).square().mean() / wanted.square().mean().clamp(min=tiny)


def watch(block: SeenBlock, total: Callable[[Tensor], Tensor]) -> SeenLayer:
    """Return what a layer is called with and puts out; a collective. It is run, and the next one gets its outputs."""
    arguments: list[dict[str, Any]] = []
    down = block.module.get_submodule("mlp.down_proj")
    sums = torch.zeros(down.get_parameter("weight").shape[1] + 1, dtype=torch.float64)

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).abs().double()
        sums[:-1] += rows.sum(0).cpu()
        sums[-1] += len(rows)

    with ExitStack() as stack:
        note = block.module.register_forward_pre_hook(
            lambda _, __, given: arguments.append(dict(given)), with_kwargs=True
        )
        stack.callback(note.remove)
        stack.callback(down.register_forward_pre_hook(see).remove)
        calls = [
            Call(
                hidden=before, arguments={k: v for k, v in arguments.pop().items() if k != "hidden_states"}, wanted=out
            )
            for before, out in block.run()
        ]
    over_ranks = total(sums)
    means = over_ranks[:-1] / over_ranks[-1].clamp(min=1)
    columns = down.get_parameter("weight").detach().double().norm(dim=0).cpu()
    return SeenLayer(calls=calls, contributions=(means * columns).float())


def distil(
    layer: nn.Module,
    part: PartName,
    seen: SeenLayer,
    total: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    lr: float,
    dtype: torch.dtype,
) -> Learned:
    """Train one half of a layer, the other as it was, on what the whole layer put out. A collective.

    A step takes one batch of every rank; the loss is `normalised_mse` of the layer's outputs, of which its input is a
    part, as of its parent's.

    Args:
        layer: With storage, fp32, on the device, one half an alternative.
        part: Which half.
        seen: Of the layer as it was.
        total: Sums over ranks.
        epochs: Passes over the rows; 0 measures the error and trains nothing.
        lr: At first.
        dtype: What the model stores.

    Raises:
        RunError: The error is not finite.
    """
    mine = {name: parameter for name, parameter in layer.named_parameters() if belongs(name, part)}
    layer.requires_grad_(False)  # noqa: FBT003
    for parameter in mine.values():
        parameter.requires_grad_(epochs > 0)
    optimizer = torch.optim.AdamW(list(mine.values()), lr=lr, weight_decay=0.0) if mine and epochs else None
    schedule = None if optimizer is None else _schedule(optimizer, epochs * len(seen.calls))
    sums = torch.zeros(2, dtype=torch.float64)
    for epoch in range(epochs if optimizer is not None else 1):
        for call in seen.calls:
            error = _error(layer, call)
            if optimizer is not None and schedule is not None:
                optimizer.zero_grad()
                error.backward()  # type: ignore[no-untyped-call]
                _mean_over_ranks(mine, total)
                optimizer.step()
                schedule.step()
            if optimizer is None or epoch == epochs - 1:
                sums += torch.stack([error.detach(), torch.ones_like(error)]).double().cpu()
    error_sum, number = total(sums).tolist()
    if not error_sum < float("inf"):
        raise RunError(f"puzzle: an alternative {part} is not learned, its error is {error_sum}; lower lr")
    tensors = {name: parameter.detach().to("cpu", dtype).clone() for name, parameter in mine.items()}
    return Learned(tensors=tensors, error=error_sum / number)


def _error(layer: nn.Module, call: Call) -> Tensor:
    device = next((parameter.device for parameter in layer.parameters()), torch.device("cpu"))
    with torch.enable_grad():
        found = layer(call.hidden.to(device).float(), **{k: in_fp32(v) for k, v in call.arguments.items()})
        return normalised_mse(found, call.wanted.to(device).float())


def in_fp32(value: Any) -> Any:
    """Return what a layer is called with in fp32: rotary tables and masks of numbers."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float()
    return tuple(in_fp32(one) for one in value) if isinstance(value, tuple) else value


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LinearLR:
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)


def _mean_over_ranks(parameters: Mapping[str, nn.Parameter], total: Callable[[Tensor], Tensor]) -> None:
    ranks = float(total(torch.ones(1)))
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad.copy_(total(parameter.grad.cpu()) / ranks)
