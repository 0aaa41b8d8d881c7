"""Attention transfer: linear attention learns to put out what softmax attention does, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.surgery import SeenBlock


LEARNED = ("feature_map_q.weight", "feature_map_k.weight", "window_factor")
"""What of linear attention softmax attention has not."""
_SCALE = 1000.0
"""Of the squared error, as in the authors' code."""


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What became of one layer."""

    learned: dict[str, Tensor]
    """Of `LEARNED`, by name, fp32 on the CPU."""
    error: float
    """Mean squared error over the mean square of the outputs, in the last pass over the rows."""


def transfer(
    student: nn.Module,
    block: SeenBlock,
    total: Callable[[Tensor], Tensor],
    *,
    epochs: int,
    lr: float,
    num_batches: int,
    generator: torch.Generator,
) -> Transferred:
    """Train what a layer's linear attention has of its own; nothing else of it changes. A collective.

    The loss is the mean squared error of what enters the output projection, over all tokens, heads and channels. A step
    takes one batch of every rank.

    Args:
        student: Linear attention with storage, of which `LEARNED` is drawn here.
        block: With softmax attention, whose other weights the student takes.
        total: Sums over ranks.
        epochs: Passes over the rows.
        lr: At first.
        num_batches: Of a pass.
        generator: Of the maps.

    Raises:
        RunError: The error is not finite.
    """
    attention = block.module.get_submodule("self_attn")
    student.load_state_dict(attention.state_dict(), strict=False)
    student.float().requires_grad_(False)  # noqa: FBT003
    mine = {name: student.get_parameter(name).requires_grad_() for name in LEARNED}
    with torch.no_grad():
        for name in LEARNED[:2]:
            drawn = nn.init.kaiming_uniform_(torch.empty(mine[name].shape), generator=generator)
            mine[name].copy_(drawn)
        mine[LEARNED[2]].fill_(torch.tensor(0.1).logit())
    optimizer = torch.optim.AdamW(list(mine.values()), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=epochs * num_batches)
    sums = torch.zeros(2, dtype=torch.float64)
    for epoch in range(epochs):
        for arguments, wanted in _seen(attention, block):
            found = _mixed(student, arguments)
            error = (found - wanted).square().mean()
            optimizer.zero_grad()
            (_SCALE * error).backward()
            _mean_over_ranks(mine, total)
            optimizer.step()
            schedule.step()
            if epoch == epochs - 1:
                sums += torch.stack([error.detach(), wanted.square().mean()]).double().cpu()
    error_sum, size = total(sums).tolist()
    if not error_sum < float("inf"):
        raise RunError(
            f"lolcats: the attention of layer {block.index} is not learned, its error is {error_sum}; lower lr"
        )
    learned = {name: parameter.detach().cpu().clone() for name, parameter in mine.items()}
    return Transferred(learned=learned, error=error_sum / size if size else 0.0)


def _mean_over_ranks(parameters: dict[str, Tensor], total: Callable[[Tensor], Tensor]) -> None:
    ranks = float(total(torch.ones(1)))
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad.copy_(total(parameter.grad.cpu()) / ranks)


def _mixed(student: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """What the student's values have been mixed to, before the output projection [B, S, heads x head_dim]."""
    with torch.enable_grad(), _inputs(student.get_submodule("o_proj")) as seen:
        student(**arguments)
    return seen[0]


def _seen(attention: nn.Module, block: SeenBlock) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """What linear attention is to be called with and to put out, of each batch."""
    with _inputs(attention.get_submodule("o_proj")) as outputs, _arguments(attention) as calls:
        for _ in block.peek():
            arguments, wanted = calls.pop(), outputs.pop()
            yield (
                {
                    "hidden_states": arguments["hidden_states"].float(),
                    "position_embeddings": tuple(table.float() for table in arguments["position_embeddings"]),
                    "position_ids": arguments["position_ids"],
                },
                wanted.float(),
            )


@contextmanager
def _inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def _arguments(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
