"""Criteria of pruning in training: how much a weight matters, from what lies on this rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from leanmill.core.views import View


@dataclass(frozen=True)
class Criterion:
    """How much each weight of a piece matters."""

    score: Callable[[View], Tensor]
    """fp32 like the weight's value."""
    reads_gradient: bool = False
    """Whether it is asked while `View.grad` is there, the dense gradient of the step before clipping; else after the
    optimizer's step."""
    adds_up: bool = False
    """Whether it is asked in every step and summed over the run."""
    is_signed: bool = False
    """Whether scores may be negative; they are least then."""


def magnitude(weight: View) -> Tensor:
    """Return |w|."""
    return weight.value.abs().float()


def outward_pull(weight: View) -> Tensor:
    """Return -w g, which is positive where the step's gradient moves w away from zero (Sanh et al., 2005.07683)."""
    assert weight.grad is not None
    return (weight.value * weight.grad).neg_().float()


def gradient_times_weight(weight: View) -> Tensor:
    """Return |w g|: by how much the step's loss changes without w, to first order (Molchanov et al., 1611.06440)."""
    return outward_pull(weight).abs()


def fisher(weight: View) -> Tensor:
    """Return the root of w^2 F, F the diagonal of the Fisher matrix as Adam's second moments estimate it.

    Half of w^2 F is what the loss changes by to second order without w (Theis et al. 2018, arXiv:1801.05787); the root
    has the same order and does not underflow. Of units that are several weights the roots are averaged.
    """
    if not weight.value.numel():
        return weight.value.float()
    return (weight.value.abs() * weight.states()["exp_avg_sq"].sqrt()).float()


CRITERIA = {
    "magnitude": Criterion(magnitude),
    "gradient": Criterion(gradient_times_weight, reads_gradient=True),
    "fisher": Criterion(fisher),
    "movement": Criterion(outward_pull, reads_gradient=True, adds_up=True, is_signed=True),
}
