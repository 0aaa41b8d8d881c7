"""Staging weights once an optimizer step on each rank's own shard, before FSDP2 gathers them.

What is gathered is the staged weight in the dtype that is computed in, or a packed form of it; its gradient
is reduced and scattered as that of any weight, and backward through the stages runs on the reduced shard.
FSDP2 has an extension point for this, tensors with `fsdp_pre_all_gather`; it loses them on the way to the
device when weights are offloaded, and takes no packed form of uneven shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, alloc_storage, free_storage
from torch.distributed.tensor import DTensor

from leanmill.core.facets import Packing, Statistic
from leanmill.core.staging import StagedOnce, run_together
from leanmill.parallel.staging import StepStaging
from leanmill.parallel.tensors import add_part, local


class ShardStaging(StepStaging):
    """Shards of weights' first dim.

    Args:
        weights: Which ones, before they are sharded.
        group: Ranks that a weight is sharded over.
        dtype: Of what is gathered; None keeps the weights'.
        packs: Gather packed forms where stages have one.
        device: Where collectives run.
    """

    _is_part = True

    def __init__(
        self,
        weights: Sequence[StagedOnce],
        group: dist.ProcessGroup,
        *,
        dtype: torch.dtype | None,
        packs: bool,
        device: torch.device,
    ) -> None:
        super().__init__(weights)
        self._group, self._dtype, self._device = group, dtype, device
        self._packings = [weight.packing if packs and group.size() > 1 else None for weight in weights]
        self._params: list[StagedParam] = []

    def adopt(self, root: nn.Module) -> None:
        """Have FSDP2 gather what is staged here.

        Args:
            root: The sharded train module.
        """
        if not self.weights:
            return
        by_weight = {id(param.sharded_param): param for param in _fsdp_params(root)}
        for weight, packing in zip(self.weights, self._packings, strict=True):
            self._params.append(StagedParam.adopt(by_weight[id(weight.raw)], packing))
            for site in weight.sites:
                site.arrives_staged = True
        # Before FSDP2's own: a forward outside of a step gathers too.
        root.register_forward_pre_hook(lambda *_: self._stage_if_stale(), prepend=True)

    def _stage_if_stale(self) -> None:
        if not self._params[0].gathered:
            with torch.no_grad():
                self._stage(has_backward=False)

    def _stage(self, *, has_backward: bool) -> None:
        for weight, own in zip(self.weights, self._own_for_parts(), strict=True):
            self._tapes.append(self._tape(weight, self._part(weight.raw), own, has_backward))
        staged = run_together([tape.staging() for tape in self._tapes], self._combine)
        for param, part in zip(self._params, staged, strict=True):
            param.gather(part if self._dtype is None else part.to(self._dtype))

    def _own_for_parts(self) -> list[list[Tensor]]:
        """What stages on a part read: their entries for its rows, other parameters whole."""
        shared = [p for weight in self.weights for p in weight.own if not weight.goes_by_row(p)]
        wholes = iter(self._gathered(shared))
        return [
            [self._part(p) if weight.goes_by_row(p) else next(wholes) for p in weight.own] for weight in self.weights
        ]

    def _gathered(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Small sharded parameters, whole, in one collective."""
        pieces = []
        for parameter in parameters:
            whole = torch.zeros(parameter.shape, dtype=torch.float64)
            part = self._part(parameter)
            whole.narrow(0, self._first_row(parameter), part.shape[0]).copy_(part)
            pieces.append(whole)
        return [
            whole.to(p.dtype).to(self._part(p).device)
            for p, whole in zip(parameters, self._reduced(pieces, dist.ReduceOp.SUM), strict=True)
        ]

    def _first_row(self, parameter: Tensor) -> int:
        rows = parameter.shape[0]
        return min(rows, self._group.rank() * math.ceil(rows / self._group.size()))

    def _combine(self, asked: list[Statistic]) -> list[Tensor]:
        answers: dict[int, Tensor] = {}
        for over_parts, operation in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):
            indices = [index for index, statistic in enumerate(asked) if statistic.over_parts == over_parts]
            answers |= zip(indices, self._reduced([asked[i].value for i in indices], operation), strict=True)
        return [answers[index] for index in range(len(asked))]

    def _reduced(self, tensors: Sequence[Tensor], operation: Any) -> list[Tensor]:
        """Reduce small tensors over the shards in one collective of fp64."""
        if not tensors:
            return []
        flat = torch.cat([t.detach().to(self._device, torch.float64).flatten() for t in tensors])
        dist.all_reduce(flat, operation, group=self._group)
        parts = flat.split([t.numel() for t in tensors])
        return [part.view(t.shape).to(t.device, t.dtype) for part, t in zip(parts, tensors, strict=True)]

    def _lend(self) -> None:
        pass  # sharded weights arrive staged at all times

    def _take_back(self) -> None:
        pass

    def _drop(self) -> None:
        for param in self._params:
            param.gathered = []

    def _part(self, tensor: Tensor) -> Tensor:
        return local(tensor.detach())

    def _add_own(self, gradients: Sequence[Sequence[Tensor | None] | None]) -> None:
        shared: list[tuple[nn.Parameter, Tensor | None]] = []
        for weight, found in zip(self.weights, gradients, strict=True):
            for parameter, gradient in zip(weight.own, found or [None] * len(weight.own), strict=True):
                if not weight.goes_by_row(parameter):
                    shared.append((parameter, gradient))
                elif gradient is not None:
                    add_part(parameter, gradient)
        # Every rank sends all of them, also what it has no gradient of.
        sent = [torch.zeros(p.shape, dtype=p.dtype) if g is None else g for p, g in shared]
        for (parameter, mine), whole in zip(shared, self._reduced(sent, dist.ReduceOp.SUM), strict=True):
            if mine is not None:
                rows = self._part(parameter).shape[0]
                add_part(parameter, whole.narrow(0, self._first_row(parameter), rows))


class StagedParam(FSDPParam):
    """What FSDP2 knows of a parameter, gathering other tensors than its shard."""

    gathered: list[Tensor]
    """This rank's share of what is gathered; empty between steps."""
    packing: Packing | None

    @classmethod
    def adopt(cls, param: FSDPParam, packing: Packing | None) -> StagedParam:
        """Make `param` one."""
        param.__class__ = cls
        assert isinstance(param, StagedParam)
        param.gathered, param.packing = [], packing
        return param

    def gather(self, part: Tensor) -> None:
        """Set what the next gathers send: this rank's rows [n, ...], contiguous."""
        rows, padded = part.shape[0], self.padded_sharded_param_size
        if rows < padded[0]:
            part = torch.cat([part, part.new_zeros(padded[0] - rows, *padded[1:])])
        self.gathered = [part.contiguous()] if self.packing is None else list(self.packing.pack(part))

    def init_dtype_attrs(self, mp_policy: MixedPrecisionPolicy) -> None:
        super().init_dtype_attrs(mp_policy)
        self.param_dtype = None  # it comes in the dtype it is computed in

    @property
    def all_gather_inputs(self) -> list[Tensor]:
        return [tensor.to(self.device, non_blocking=True).view(-1) for tensor in self.gathered]

    @torch.no_grad()
    def init_unsharded_param(self) -> None:
        if self.packing is None:
            super().init_unsharded_param()
            return
        packed = [
            output.view(-1, *mine.shape[1:])
            for output, mine in zip(self.all_gather_outputs, self.gathered, strict=True)
        ]
        weight = self.packing.unpack(packed)[: self._orig_size[0]]
        if not hasattr(self, "_unsharded_param"):
            self._unsharded_inner_tensors = [torch.empty_like(weight)]
            self._unsharded_param = nn.Parameter(self._whole(), self.sharded_param.requires_grad)
        (held,) = self._unsharded_inner_tensors
        alloc_storage(held)
        # Autograd keeps the parameter from forward to backward, while its memory comes and goes.
        with torch.autograd._unsafe_preserve_version_counter(held):
            held.copy_(weight)
        for tensor in self.all_gather_outputs:
            free_storage(tensor)

    def _whole(self) -> Tensor:
        """What is gathered, as the module had it: of experts that ranks share, a DTensor."""
        (held,) = self._unsharded_inner_tensors
        if self._unsharded_dtensor_spec is None:
            return held
        mesh, placements = self._unsharded_dtensor_spec.mesh, self._unsharded_dtensor_spec.placements
        shape = self._unsharded_dtensor_spec.shape
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(held, mesh, placements, run_check=False, shape=shape, stride=stride)


def _fsdp_params(root: nn.Module) -> Iterator[FSDPParam]:
    for module in root.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            # PyTorch 2.11 has one group a module.
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                yield from () if group is None else group.fsdp_params
