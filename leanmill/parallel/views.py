"""Rule views where the optimizer sees the module's own parameters: whole ones, and shards that are DTensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from leanmill.core.errors import ConfigError
from leanmill.core.names import state_name
from leanmill.core.views import Box, Span, View, Views, check_same_shape
from leanmill.parallel.collectives import reduced
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.tensors import local


class WholeView(View):
    """All of a parameter: one process, and replicas, which compute the same on every rank.

    Args:
        name: Of the parameter.
        parameter: Live.
        optimizer: Which holds its state; None for a frozen one.
    """

    def __init__(self, name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> None:
        self.name, self.parameter, self.optimizer = name, parameter, optimizer
        self.piece: Box | Span = self._piece()

    def _piece(self) -> Box:
        shape = tuple(self.parameter.shape)
        return Box(shape, (0,) * len(shape), shape)

    @property
    def value(self) -> Tensor:
        return local(self.parameter.detach())

    @property
    def grad(self) -> Tensor | None:
        return None if self.parameter.grad is None else local(self.parameter.grad)

    def states(self) -> dict[str, Tensor]:
        if self.optimizer is None or self.parameter not in self.optimizer.state:
            return {}
        pieces = {k: local(v) for k, v in self.optimizer.state[self.parameter].items() if isinstance(v, Tensor)}
        return {key: piece for key, piece in pieces.items() if piece.shape == self.value.shape and piece.dim() > 0}

    def reduce(self, tensor: Tensor, op: Literal["sum", "max", "min"]) -> Tensor:
        return tensor

    def beside(self, parameter: nn.Parameter) -> View:
        check_same_shape(self, parameter.shape)
        return type(self)(f"(beside {self.name})", parameter, None)


class ShardView(WholeView):
    """The box of a parameter that is a DTensor; ranks past the end of a short dim have an empty one."""

    parameter: DTensor  # type: ignore[assignment]

    def _piece(self) -> Box:
        mesh, placements = self.parameter.device_mesh, self.parameter.placements
        sizes, offsets = compute_local_shape_and_global_offset(self.parameter.shape, mesh, placements)
        return Box(tuple(self.parameter.shape), tuple(offsets), tuple(sizes))

    def reduce(self, tensor: Tensor, op: Literal["sum", "max", "min"]) -> Tensor:
        # Only over the dims it is sharded over: replicas of a piece would count twice.
        for dim, placement in enumerate(self.parameter.placements):
            if not placement.is_replicate():
                tensor = reduced(tensor, op, self.parameter.device_mesh.get_group(dim))
        return tensor


class ModelViews(Views):
    """Names of the parameters as they are now; looked up only where a rule asks, since views are made every step.

    Args:
        model: The live causal LM.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(state_parameters(self._model, aliases=True))

    @cached_property
    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in reversed(self._parameters.items())}

    def name_of(self, parameter: nn.Parameter) -> str:
        """Return the (first) name of a live parameter."""
        return self._names[id(parameter)]

    def named(self, name: str) -> View:
        return self.of(self._parameters[state_name(name)])


class NativeViews(ModelViews):
    """Views under the engines on PyTorch's own parallelism.

    Args:
        model: The live causal LM.
        optimizer: Of its trained parameters.
        is_scattered: Whether what of a parameter is here is no box of it, so that there is no view of it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        is_scattered: Callable[[Tensor], bool] = lambda parameter: False,
    ) -> None:
        super().__init__(model)
        self._optimizer, self._is_scattered = optimizer, is_scattered

    def of(self, parameter: nn.Parameter) -> View:
        """Return the view of a live parameter.

        Raises:
            ConfigError: Its experts are fully sharded, and lie here in no order that a rule could know.
        """
        if self._is_scattered(parameter):
            raise ConfigError(
                f"a step rule reads {self.name_of(parameter)}, and layout.experts=fully_sharded moves its experts "
                f"between ranks; set layout.experts=spread and layout.ep, or exclude the experts from the technique"
            )
        kind = ShardView if isinstance(parameter, DTensor) else WholeView
        return kind(self.name_of(parameter), parameter, self._optimizer)

    def publish(self, views: Iterable[View]) -> None:
        """Do nothing: forward reads what was written."""
