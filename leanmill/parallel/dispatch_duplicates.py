"""Experts behind tensor parallelism: ranks that hold the same tokens send a share of them each.

With tensor parallelism all ranks of a group hold the activations of all their tokens between blocks. If each
sent them to the experts, these would compute every token as many times. So each takes a slice, and the
results are gathered (Singh et al., 2023, arXiv:2303.06318, section 4.1): all-to-alls carry 1 / ranks of the
bytes, for one all-gather inside the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812

from leanmill.core.dispatch import Dispatch, ExpertCompute, Meanwhile


class WithoutDuplicates:
    """Gives another dispatch this rank's slice of the tokens that all ranks of a group hold.

    Rank r takes tokens r x ceil(T/n) to (r+1) x ceil(T/n) - 1; the last may have fewer, or none. Tokens,
    routing and the gradient of the result must be the same on all ranks of the group, and so are the result
    and the gradients of tokens and combine weights. Experts that every rank of the group holds get the
    gradients of the rank's own slice: sum them over the group.

    In a compiled block it is a graph break, as the dispatch between ranks is.

    No layout holds the same tokens on several ranks yet, so nothing sets it: a layout with tensor parallelism
    wraps the dispatch in it (`leanmill.core.experts.set_dispatch`), with its group of tensor ranks.
    """

    def __init__(self, dispatch: Dispatch, group: dist.ProcessGroup) -> None:
        """Share out between the ranks of `group` what `dispatch` brings to experts."""
        self.dispatch, self.group = dispatch, group

    def __deepcopy__(self, memo: Any) -> WithoutDuplicates:
        """A copy of a model meets the same ranks."""
        return self

    @torch.compiler.disable
    def __call__(
        self,
        compute: ExpertCompute,
        tokens: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        *,
        meanwhile: Meanwhile | None = None,
    ) -> Tensor:
        """See `leanmill.core.dispatch.Dispatch`."""
        own_tokens, own_weights = (_TakeSlice.apply(t, self.group) for t in (tokens, top_k_weights))
        own_index = _slice(top_k_index, self.group)
        results = self.dispatch(compute, own_tokens, own_index, own_weights, meanwhile=meanwhile)
        return _GatherSlices.apply(results, tokens.shape[0], self.group)  # type: ignore[no-any-return]


class _TakeSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.num_rows, ctx.group = rows.shape[0], group
        return _slice(rows, group).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.num_rows, ctx.group), None


class _GatherSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(rows, num_rows, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _slice(grad, ctx.group).contiguous(), None, None


def _slice(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    share = _share(rows.shape[0], group)
    return rows[group.rank() * share : (group.rank() + 1) * share]


def _gather(rows: Tensor, num_rows: int, group: dist.ProcessGroup) -> Tensor:
    """Put all ranks' slices together."""
    functional = torch.ops._c10d_functional
    padded = F.pad(rows, (0, 0, 0, _share(num_rows, group) - rows.shape[0])).contiguous()
    gathered = functional.all_gather_into_tensor(padded, group.size(), group.group_name)
    return functional.wait_tensor(gathered)[:num_rows]  # type: ignore[no-any-return]


def _share(num_rows: int, group: dist.ProcessGroup) -> int:
    return -(-num_rows // group.size())
