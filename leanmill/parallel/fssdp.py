"""Experts sharded over all ranks, each owned by one: spreading them, moving them, and whole ones for checkpoints.

A parameter of experts is a DTensor over all ranks whose local part holds the experts that this rank owns,
in ascending order. At first those are the contiguous ones that a DTensor has; once the experts have values
their owners follow the load, and a rank may own more of one layer and fewer of another. So nothing outside may
read where the local part lies off the DTensor: engines hand out a contiguous copy (`handed_out`) and take one
back (`take_in`), which is what checkpoints, gathers and exports see.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from leanmill.core.errors import ConfigError
from leanmill.core.experts import set_dispatch, stacked_parameters
from leanmill.parallel.collectives import reduced
from leanmill.parallel.config import FullyShardedExperts
from leanmill.parallel.expert_parallel import check_experts, expert_modules
from leanmill.parallel.fssdp_dispatch import FullyShardedDispatch
from leanmill.parallel.fssdp_placement import Owners, choose_owners, contiguous_owners, imbalance
from leanmill.parallel.fssdp_travel import Parcels, exchange
from leanmill.parallel.layout import Layout
from leanmill.parallel.tensors import full


WORTH_MOVING = 0.05
"""Share of the imbalance that new owners must take off before experts move to them."""


class OwnedExperts:
    """The experts of a model under `layout.experts=fully_sharded`; spreads them at construction, on the meta device.

    Args:
        model: The causal LM, with everything its techniques add.
        layout: Of the run; its experts are spread over all ranks.

    Raises:
        ConfigError: The model has no stacked experts, our compute does not cover them, or a technique puts stages
            on them.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        options = layout.fully_sharded
        assert options is not None
        check_experts(model, layout.ep, is_even=False)
        self._options: FullyShardedExperts = options
        self._mesh: DeviceMesh = layout.experts["ep"]
        self.group: dist.ProcessGroup = layout.experts.get_group("ep")
        self._steps = 0
        self._dispatches: list[FullyShardedDispatch] = []
        for name, module, num_experts in expert_modules(model):
            self._spread(name, module, num_experts)
        self._settled = False

    def _spread(self, name: str, module: nn.Module, num_experts: int) -> None:
        if "sites" in module._modules:
            raise ConfigError(
                f"{name} carries stages of a technique, which layout.experts=fully_sharded does not send along with "
                f"copies; add {name!r} to the technique's exclude, or set layout.experts=spread and layout.ep"
            )
        owners = contiguous_owners(num_experts, self.group.size())
        options = self._options
        dispatch = FullyShardedDispatch(
            module, self.group, owners, materialise=options.materialise, rematerialise=options.rematerialise
        )
        set_dispatch(module, dispatch, name)
        self._dispatches.append(dispatch)
        num_owned = owners.count(self.group.rank())
        for key in stacked_parameters(module):
            whole = module._parameters[key]
            assert whole is not None
            part = whole.detach().new_empty((num_owned, *whole.shape[1:]))
            module._parameters[key] = nn.Parameter(self._as_dtensor(part, whole), whole.requires_grad)

    def _as_dtensor(self, part: Tensor, whole: Tensor) -> Tensor:
        where = self._mesh, (Shard(0),)
        return DTensor.from_local(part, *where, run_check=False, shape=whole.shape, stride=whole.stride())

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the live parameters."""
        for _, parameter in self._placed():
            yield parameter

    def _placed(self) -> Iterator[tuple[FullyShardedDispatch, nn.Parameter]]:
        for dispatch in self._dispatches:
            for key in stacked_parameters(dispatch.module):
                yield dispatch, getattr(dispatch.module, key)

    def settle(self, optimizer: torch.optim.Optimizer) -> None:
        """Give experts their first owners, once they have values; contiguous ones where those are balanced."""
        size = self.group.size()
        # NCCL wants every rank in a group's first call, and only some of them send or receive when experts move.
        reduced(torch.zeros(1, device=next(self.parameters()).device), "sum", self.group)
        if any(dispatch.num_experts % size for dispatch in self._dispatches):
            self._move(choose_owners([[0.0] * d.num_experts for d in self._dispatches], size), optimizer)

    # Whole experts, for whoever is not to know of owners.

    def owns(self, parameter: Tensor) -> bool:
        """Whether `parameter` is one of these."""
        return any(parameter is one for one in self.parameters())

    def handed_out(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """Return `tensor` with experts where a DTensor sharded along dim 0 has them: a copy, if owners are others.

        A collective. Of what is laid out like another parameter, `tensor` itself.

        Args:
            parameter: Of these experts or another one.
            tensor: Laid out like it: itself, its gradient, a part of its optimizer state.
        """
        owners = self._owners_of(parameter)
        if owners is None or not isinstance(tensor, DTensor):
            return tensor
        contiguous = contiguous_owners(len(owners), self.group.size())
        if owners == contiguous:
            return tensor
        return self._as_dtensor(self._moved(tensor.to_local(), owners, contiguous), tensor)

    @torch.no_grad()
    def take_in(self, parameter: Tensor, target: Tensor, value: Tensor) -> bool:
        """Write `value`, whole or sharded in whatever way, into `target`, which is laid out like `parameter`.

        A collective. False where it is for somebody else to write.

        Raises:
            ValueError: The shapes differ.
        """
        owners = self._owners_of(parameter)
        if owners is None or not isinstance(target, DTensor):
            return False
        if target.shape != value.shape:
            raise ValueError(f"shape {tuple(value.shape)} for a tensor of shape {tuple(target.shape)}")
        if isinstance(value, DTensor) and value.device_mesh == self._mesh and value.placements == (Shard(0),):
            contiguous = contiguous_owners(len(owners), self.group.size())
            part = self._moved(value.to_local().to(target.dtype), contiguous, owners)
        else:
            part = full(value)[self._mine(owners)]
        target.to_local().copy_(part)
        return True

    def _owners_of(self, parameter: Tensor) -> Owners | None:
        return next((dispatch.owners for dispatch, one in self._placed() if one is parameter), None)

    def _mine(self, owners: Owners) -> list[int]:
        return [expert for expert, owner in enumerate(owners) if owner == self.group.rank()]

    @torch.no_grad()
    def _moved(self, part: Tensor, source: Owners, target: Owners) -> Tensor:
        """Return the experts that this rank owns under `target`, from those it owns under `source`."""
        part = part.detach().contiguous()
        before = {expert: place for place, expert in enumerate(self._mine(source))}
        after = self._mine(target)
        moved = part.new_empty((len(after), *part.shape[1:]))
        send: Parcels = [(target[e], part[place]) for e, place in before.items() if e not in set(after)]
        receive: Parcels = []
        for place, expert in enumerate(after):
            if expert in before:
                moved[place].copy_(part[before[expert]])
            else:
                receive.append((source[expert], moved[place]))
        exchange(send, receive, self.group)
        return moved

    # Owners by load.

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Count a step, and after every `move_every_steps` let owners follow the load since the last time."""
        self._steps += 1
        if self._options.move_every_steps is None or self._steps % self._options.move_every_steps:
            return
        loads = self._loads(self._counts().tolist())
        size, owners = self.group.size(), [dispatch.owners for dispatch in self._dispatches]
        chosen = choose_owners(loads, size)
        now, then = (imbalance(loads, placed, size) for placed in (owners, chosen))
        if then - 1 < (1 - WORTH_MOVING) * (now - 1):
            self._move(chosen, optimizer)
        for dispatch in self._dispatches:
            dispatch.forget()

    def _counts(self) -> Tensor:
        """Counts of all ranks since owners were last looked at [2, experts of all layers]; one reduction."""
        device = next(self.parameters()).device
        zeros = [torch.zeros(2, d.num_experts, dtype=torch.int64, device=device) for d in self._dispatches]
        found = [d.travelled for d in self._dispatches]
        mine = [zero if one is None else one for zero, one in zip(zeros, found, strict=True)]
        return reduced(torch.cat(mine, dim=1), "sum", self.group)

    def _loads(self, counts: list[list[int]]) -> list[list[float]]:
        """What experts are balanced by: copies that travelled to them; where equal, that is none, copies in all."""
        travelled, chosen = counts
        whole = 1 + sum(chosen)
        mixed = iter(sent + all_of_it / whole for sent, all_of_it in zip(travelled, chosen, strict=True))
        return [[next(mixed) for _ in range(dispatch.num_experts)] for dispatch in self._dispatches]

    @torch.no_grad()
    def _move(self, chosen: Sequence[Owners], optimizer: torch.optim.Optimizer) -> None:
        """Move weights and optimizer state to their new owners, between steps."""
        for dispatch, owners in zip(self._dispatches, chosen, strict=True):
            if owners == dispatch.owners:
                continue
            for key in stacked_parameters(dispatch.module):
                parameter = getattr(dispatch.module, key)
                state = optimizer.state.get(parameter, {}).values()
                for tensor in (parameter, *(one for one in state if isinstance(one, DTensor))):
                    tensor._local_tensor = self._moved(tensor._local_tensor, dispatch.owners, owners)
            dispatch.owners = list(owners)

    # Its state, for a resumed run to go on bitwise: whose tokens meet where decides the order of sums.

    def state_dict(self) -> dict[str, Any]:
        """Return owners and counts, JSON-able, equal on all ranks; a collective."""
        return {
            "num_ranks": self.group.size(),
            "steps": self._steps,
            "owners": [dispatch.owners for dispatch in self._dispatches],
            "counts": self._counts().tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Take up what `state_dict` returned; at another number of ranks owners are chosen anew, by the load."""
        counts = torch.tensor(state["counts"])
        loads = self._loads(state["counts"])
        same = state["num_ranks"] == self.group.size()
        self._move(state["owners"] if same else choose_owners(loads, self.group.size()), optimizer)
        self._steps = int(state["steps"])
        first, device = 0, next(self.parameters()).device
        for dispatch in self._dispatches:
            part = counts[:, first : first + dispatch.num_experts].to(device)
            dispatch.travelled = part if self.group.rank() == 0 else torch.zeros_like(part)
            first += dispatch.num_experts
