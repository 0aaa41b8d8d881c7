"""Passes: one-shot compression of a model folder into another one, a block at a time. Importing this imports no torch.

A pass is a validated configuration that solves one linear layer after another, given what the layer's
inputs looked like on calibration text. It never sees the trainer, which streams the blocks through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pydantic import Field

from leanmill.core.config import Config


if TYPE_CHECKING:
    from torch import Tensor

    from leanmill.core.gram import Gram


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What calibration showed of the inputs x of one linear layer, over all ranks."""

    num_tokens: int
    square_sum: Tensor
    """Sum of x^2 a feature [in], fp32."""
    gram: Gram | None
    """Sum of x x^T [in, in], fp32, where the solver asked for it."""


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What became of one layer."""

    weight: Tensor
    """[out, in] fp32."""
    squared_error: float | None = None
    """||(W' - W) X||^2 on the calibration inputs X, where the solver knows it."""


class LayerSolver(Protocol):
    """Turns the weight of one linear layer into its compressed one."""

    needs_gram: bool
    """Whether it needs more than `square_sum`; a gram matrix is [in, in]."""

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Refuse a weight [out, in] that does not fit, before anything is computed.

        Raises:
            ConfigError: It does not; the message says what to type.
        """
        ...

    def prepare(self, statistics: InputStatistics) -> Callable[[Tensor], Solution]:
        """Return what solves a layer's weight [out, in] fp32, which it may overwrite.

        Called once for all layers that share their inputs.

        Args:
            statistics: Of the inputs; the gram matrix may be used up.

        Raises:
            RunError: The inputs are such that nothing can be solved.
        """
        ...


class PassConfig(Config):
    """Base of every pass's configuration; subclasses add `type: Literal["name"]`."""

    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear weight of the decoder blocks."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""

    def solver(self) -> LayerSolver:
        """Return what solves a layer."""
        raise NotImplementedError
