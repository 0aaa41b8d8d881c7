"""Scales of integer grids, and what shares one: a matrix, an output row, or a group of neighbours in a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.site import Site
from leanmill.kernels.fake_quant.op import fake_quant


Granularity = Literal["tensor", "row", "group"]
ScaleKind = Literal["absmax", "mse"]


SHARES = tuple(1.0 - 0.02 * index for index in range(40))
"""Shares of the absmax scale that `mse` tries, the largest first."""


def symmetric_scale(
    values: Tensor,
    num_bits: int,
    rule: ScaleKind,
    granularity: Granularity,
    group_size: int | None,
) -> Tensor:
    """Return the scale of symmetric codes of `num_bits`, see `fitted_scale`.

    Args:
        values: [..., out, in].
        num_bits: 2 to 8.
        rule: `absmax` or `mse`.
        granularity: What shares a scale.
        group_size: Neighbours of a group.
    """

    def rounded(exact: Tensor, scale: Tensor) -> Tensor:
        return fake_quant(exact, scale, num_bits=num_bits, grid="symmetric")

    return fitted_scale(values, rounded, 2 ** (num_bits - 1) - 1, rule, granularity, group_size)


def fitted_scale(
    values: Tensor,
    rounded: Callable[[Tensor, Tensor], Tensor],
    largest_code: float,
    rule: ScaleKind,
    granularity: Granularity,
    group_size: int | None,
) -> Tensor:
    """Return the scale of a grid around zero, in the shape of `scale_shape`, at least fp32.

    Args:
        values: [..., out, in].
        rounded: Takes values and scales, gives values on the grid.
        largest_code: What the grid reaches to at scale 1.
        rule: `absmax` makes the largest magnitude the outermost code, `mse` takes of `SHARES` of that
            scale the one with the least squared error.
        granularity: What shares a scale.
        group_size: Neighbours of a group.
    """
    exact = values.to(torch.promote_types(values.dtype, torch.float32))
    absmax = shared_amax(exact, granularity, group_size) / largest_code
    if rule == "absmax":
        return absmax
    best, least = absmax, torch.full_like(absmax, torch.inf)
    for share in SHARES:
        candidate = absmax * share
        error = shared_sum((rounded(exact, candidate) - exact).square(), granularity, group_size)
        best, least = torch.where(error < least, candidate, best), torch.minimum(error, least)
    return best


def scale_shape(weight_shape: Sequence[int], granularity: Granularity, group_size: int | None) -> tuple[int, ...]:
    """Shape of the scales of a weight [..., out, in]: [..., 1, 1], [..., out, 1] or [..., out, in / group_size].

    The scale of a whole plain matrix is (1,), which every sharding engine takes.
    """
    *experts, out_features, in_features = weight_shape
    if granularity == "tensor":
        return (*experts, 1, 1) if experts else (1,)
    return (*experts, out_features, 1 if group_size is None else in_features // group_size)


def shared_amax(values: Tensor, granularity: Granularity, group_size: int | None) -> Tensor:
    """Largest magnitude of what shares a scale, in the shape of the scales."""
    if granularity == "tensor":
        return (
            values.abs()
            .amax((-2, -1), keepdim=values.dim() > 2)
            .reshape(scale_shape(values.shape, granularity, group_size))
        )
    return _grouped(values.abs(), group_size).amax(-1)


def shared_sum(values: Tensor, granularity: Granularity, group_size: int | None) -> Tensor:
    """Sum over what shares a scale, in the shape of the scales."""
    if granularity == "tensor":
        return values.sum((-2, -1)).reshape(scale_shape(values.shape, granularity, group_size))
    return _grouped(values, group_size).sum(-1)


def check_groups(sites: Sequence[Site], technique: str, group_size: int | None) -> None:
    """Refuse weights whose rows `group_size` does not divide.

    Raises:
        ConfigError: One is not divided; the message says what to type.
    """
    for site in sites:
        num_in = site.raw_weight.shape[-1]
        if group_size is not None and num_in % group_size:
            raise ConfigError(
                f"{site.site_name}: group_size {group_size} does not divide the last dim of its weight "
                f"{list(site.raw_weight.shape)}; add {site.site_name!r} to {technique}.exclude or choose a group_size "
                f"that divides {num_in}"
            )


def check_group_size(name: str, shape: tuple[int, int], group_size: int | None) -> None:
    """Refuse a weight [out, in] of a pass whose rows `group_size` does not divide.

    Raises:
        ConfigError: They are not divided; the message says what to type.
    """
    if group_size is not None and shape[1] % group_size:
        raise ConfigError(
            f"{name}: group_size {group_size} does not divide the last dim of its weight {list(shape)}; "
            f"add {name!r} to exclude, choose a group_size that divides {shape[1]}, or set group_size: null"
        )


def _grouped(values: Tensor, group_size: int | None) -> Tensor:
    return values.unflatten(-1, (-1, group_size or values.shape[-1]))
