"""Where the experts of a layer are computed: dispatch -> compute -> combine behind one call.

A module of stacked experts asks its dispatch (`dispatch_of`) to bring routed tokens to experts and the
results back. `LocalDispatch` computes all of them here. A layout that spreads experts over ranks sets
another one (`leanmill.core.experts.set_dispatch`), which sends tokens to the ranks of their experts; the
module then holds the weights of its rank's experts only. Stages on expert weights work on what is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn


Meanwhile = Callable[[], None]
"""Work of the same layer that does not wait for routed tokens, such as its shared experts."""


class ExpertCompute(Protocol):
    """Computes the experts whose weights are on this rank, see `leanmill.core.experts.compute_experts`."""

    def __call__(
        self,
        tokens: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        num_experts: int | None = None,
        num_copies: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the sum over each token's experts of weight x expert(token), [T, H].

        Args:
            tokens: [T, H]; T may be 0, which still gives all weights gradients, of zero.
            top_k_index: [T, K] int64, counted among the experts that are here; their number itself
                stands for a copy that nobody here takes.
            top_k_weights: [T, K], differentiable.
            num_experts: How many are here; None stands for all of the module's.
            num_copies: How many entries of `top_k_index` name an expert, where the caller knows: nothing
                is stored for the others then.
            weights: Of `num_experts` experts, by the module's own names, instead of those that it holds; what
                stages make of its own is not for them.
        """


class Dispatch(Protocol):
    """Brings tokens to their experts, has them computed, and brings the results back."""

    def __call__(
        self,
        compute: ExpertCompute,
        tokens: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        meanwhile: Meanwhile | None = None,
    ) -> Tensor:
        """Return the sum over each token's experts of weight x expert(token), [T, H], T as on this rank.

        Gradients reach tokens, combine weights and the weights of experts, wherever those are.

        Args:
            compute: The experts that are here.
            tokens: This rank's tokens [T, H].
            top_k_index: Their experts [T, K] int64, counted among all; the number of all experts stands for
                a copy that was dropped, which goes nowhere.
            top_k_weights: [T, K].
            meanwhile: Called once, when whatever travels first has set out and nothing has been waited for.
        """


class LocalDispatch:
    """All experts are here."""

    def __call__(
        self,
        compute: ExpertCompute,
        tokens: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        meanwhile: Meanwhile | None = None,
    ) -> Tensor:
        """Compute every routed expert, without dropping tokens."""
        if meanwhile is not None:
            meanwhile()
        return compute(tokens, top_k_index, top_k_weights)


LOCAL = LocalDispatch()
ATTRIBUTE = "expert_dispatch"
MEANWHILE = "expert_meanwhile"


def dispatch_of(module: nn.Module) -> Dispatch:
    """Return what brings tokens to the experts of `module`: local unless a layout has set another."""
    return getattr(module, ATTRIBUTE, LOCAL)


def meanwhile_of(module: nn.Module) -> Meanwhile | None:
    """Return what is to be done while tokens travel to the experts of `module`, if a layout has set something."""
    return getattr(module, MEANWHILE, None)
