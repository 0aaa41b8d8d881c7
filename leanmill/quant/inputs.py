"""Stages of the activations that enter BitNet's layers: a norm, and 8 bits a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from leanmill.core.site import Site
from leanmill.core.stage import InputSlot, InputStage
from leanmill.kernels.fake_quant.activations import quantise_activations
from leanmill.quant.stages import QuantInput


NORM_EPS = 1e-6
"""Added to the mean square, as in transformers' layers of this kind."""


class Int8Input(QuantInput):
    """Round every token [..., in] to 8-bit codes and back by its largest magnitude, straight-through."""

    def rounded(self, tokens: Tensor) -> Tensor:
        return quantise_activations(tokens)


class NormInput(InputStage):
    """Divide every token [..., in] by its root mean square, in at least fp32; no gain is trained.

    BitNet (Wang et al. 2023, arXiv:2310.11453) has a norm inside of every layer, before the rounding. A gain would
    only weigh inputs, which the norms that models have before attention and MLP do already.
    """

    slot: ClassVar[InputSlot] = InputSlot.NORM
    may_be_left_out: ClassVar[bool] = False
    norm_eps: ClassVar[float | None] = NORM_EPS

    def forward(self, tokens: Tensor) -> Tensor:
        exact = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        scale = (exact.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
        return (exact * scale).to(tokens.dtype)


def put_inputs(
    selected: Sequence[Site],
    *,
    norm: type[NormInput] | None,
    rounding: type[Int8Input] | None,
    has_warmup: bool,
) -> None:
    """Give the input of every selected site BitNet's stages.

    Args:
        selected: The sites.
        norm: The technique's norm; None for none.
        rounding: Its 8-bit tokens; None for none.
        has_warmup: See `WarmedUp`.
    """
    for site in selected:
        if norm is not None:
            site.put_input(norm())
        if rounding is not None:
            site.put_input(rounding(has_warmup=has_warmup, device=site.raw_weight.device))
