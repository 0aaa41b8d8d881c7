"""Removing inputs of a layer a group at a time, the others making up for it: optimal brain surgery on structures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Removal:
    """In what order the groups of a layer's inputs go, and what that costs."""

    order: Tensor
    """Groups in the order they go [groups], int64."""
    errors: Tensor
    """||(W' - W) X||^2 / ||W X||^2 once so many have gone [groups + 1], fp64; from 0 to 1."""


def in_turn(weight: Tensor, gram: Tensor, group_size: int, damping: float) -> Removal:
    """Remove one group after another, each time that of least error, until none is left.

    ZipLM's eq. 2 and 3: a group S costs sum_i W_iS (H^-1_SS)^-1 W_iS^T, and the other columns take
    -W_S (H^-1_SS)^-1 H^-1_S: on.

    Args:
        weight: [out, in] fp64.
        gram: Sum of x x^T over inputs x [in, in], fp64.
        group_size: Neighbouring inputs that go together.
        damping: Added to the diagonal of `gram`, as a share of its mean.
    """
    count = weight.shape[1] // group_size
    hessian = damped(gram, damping)
    left, inverse = weight.clone(), torch.linalg.inv(hessian)
    energy = float(torch.einsum("oi,ij,oj->", weight, hessian, weight)) or 1.0
    alive = torch.ones(count, dtype=torch.bool, device=weight.device)
    order, errors, total = [], [0.0], 0.0
    for _ in range(count):
        costs = torch.where(alive, _costs(left, inverse, group_size), torch.inf)
        chosen = int(costs.argmin())
        total += float(costs[chosen])
        _remove_(left, inverse, slice(chosen * group_size, (chosen + 1) * group_size))
        alive[chosen] = False
        order.append(chosen)
        errors.append(min(1.0, total / energy))
    return Removal(order=torch.tensor(order), errors=torch.tensor(errors, dtype=torch.float64))


def damped(gram: Tensor, damping: float) -> Tensor:
    """Return `gram` [in, in] with a share of its mean diagonal added to its diagonal."""
    mean = gram.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    return gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def refitted(weight: Tensor, gram: Tensor, kept: Tensor, damping: float) -> Tensor:
    """Return the columns that stay, so that their output is nearest to that of all [out, kept].

    What removing the others in turn leads to, in one solve: W H_:K H_KK^-1.

    Args:
        weight: [out, in] fp64.
        gram: See `in_turn`.
        kept: Indices of the inputs that stay.
        damping: See `in_turn`.
    """
    hessian = damped(gram, damping)
    return torch.linalg.solve(hessian[kept][:, kept], (weight @ hessian[:, kept]).t()).t()


def _costs(weight: Tensor, inverse: Tensor, group_size: int) -> Tensor:
    if group_size == 1:
        return weight.square().sum(0) / inverse.diagonal().clamp(min=torch.finfo(inverse.dtype).tiny)
    return torch.stack(list(_costs_of_groups(weight, inverse, group_size)))


def _costs_of_groups(weight: Tensor, inverse: Tensor, group_size: int) -> Iterator[Tensor]:
    for first in range(0, weight.shape[1], group_size):
        group = slice(first, first + group_size)
        columns = weight[:, group]
        if not columns.any():  # gone, or never there: its part of the inverse is none
            yield weight.new_zeros(())
            continue
        yield (torch.linalg.solve(inverse[group, group], columns.t()) * columns.t()).sum()


def _remove_(weight: Tensor, inverse: Tensor, group: slice) -> None:
    """Take a group out of both, and have the others make up for it."""
    factor = torch.linalg.inv(inverse[group, group])
    rows = inverse[group].clone()
    weight -= weight[:, group] @ factor @ rows
    inverse -= rows.t() @ factor @ rows
    # Exactly, so that rounding brings nothing back.
    weight[:, group] = 0
    inverse[group] = 0
    inverse[:, group] = 0
