"""Rule views of what ZeRO has cut up: fragments of flat masters (stages 1 and 2), flat partitions (stage 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.views import Box, Span, View, check_same_shape
from leanmill.parallel.collectives import reduced
from leanmill.parallel.deepspeed_experts import LocalExperts
from leanmill.parallel.deepspeed_state import ZeroState, partition_rank
from leanmill.parallel.views import ModelViews, WholeView


class _FlatView(View):
    """Elements [start, stop) of the flattened parameter; the optimizer's tensors are flat too.

    Args:
        name: Of the parameter.
        parameter: Live.
        zero: What knows DeepSpeed's optimizer wrapper.
        span: Which elements of what this rank's model has of it, which of experts is a part.
        experts: What knows which parameters are parts.
    """

    def __init__(self, name: str, parameter: Any, zero: ZeroState, span: Span, experts: LocalExperts) -> None:
        self.name, self.parameter, self.zero, self.span, self.experts = name, parameter, zero, span, experts
        first, shape = experts.offset(parameter), tuple(experts.shape(parameter))
        self.piece = Span(shape, first + span.start, first + span.stop) if experts.is_part(parameter) else span

    @property
    def num_held(self) -> int:
        """Elements that lie here."""
        return self.span.stop - self.span.start

    @property
    def grad(self) -> Tensor | None:
        if not self.zero.has_gradients:
            return None
        gradient = self._gradient()
        # With optimizer offload, DeepSpeed has the norms of gradients noted down by now.
        self.zero.written_gradients[self.zero.optimizer.get_param_id(self.parameter)] = gradient
        return gradient

    def _gradient(self) -> Tensor:
        raise NotImplementedError

    def _states_at(self, flat: Tensor, start: int) -> dict[str, Tensor]:
        state = self.zero.base.state.get(flat, {})
        whole = {key: v for key, v in state.items() if isinstance(v, Tensor) and v.shape == flat.shape}
        return {key: value.data.narrow(0, start, self.num_held) for key, value in whole.items()}

    def reduce(self, tensor: Tensor, op: Literal["sum", "max", "min"]) -> Tensor:
        return reduced(tensor, op)

    def publish(self) -> None:
        """Bring `value` to what forward reads."""
        raise NotImplementedError


class FragmentView(_FlatView):
    """Stages 1 and 2: what of a parameter lies in this rank's part of its group's flat fp32 master.

    Fragments are cut anywhere, also inside a row, and most ranks have none of a given parameter.
    """

    def __init__(self, name: str, parameter: Any, zero: ZeroState, experts: LocalExperts) -> None:
        self.mapping = parameter._hp_mapping
        address = None if self.mapping is None else self.mapping.lp_fragment_address
        start, count = (0, 0) if address is None else (address.start, address.numel)
        super().__init__(name, parameter, zero, Span(tuple(parameter.shape), start, start + count), experts)

    @property
    def value(self) -> Tensor:
        if self.mapping is None:
            return torch.empty(0, device=self.parameter.device)
        return self.mapping.hp_fragment.data  # type: ignore[no-any-return]

    def _gradient(self) -> Tensor:
        if self.mapping is None:
            return torch.empty(0, device=self.parameter.device)
        return self.mapping.get_lp_grad_fragment(self.parameter._index_in_param_group).view(-1)  # type: ignore[no-any-return]

    def states(self) -> dict[str, Tensor]:
        if self.mapping is None:
            return {}
        flat = self.zero.optimizer.single_partition_of_fp32_groups[self.mapping.param_group_index]
        return self._states_at(flat, self.mapping.hp_fragment_address.start)

    def beside(self, parameter: nn.Parameter) -> View:
        check_same_shape(self, self.experts.shape(parameter))
        return FragmentOfReplica(f"(beside {self.name})", parameter, self.zero, self.span, self.experts)

    def publish(self) -> None:
        """Nothing: `ZeroViews.publish` gathers all masters at once, as the optimizer step does."""


class FragmentOfReplica(_FlatView):
    """Stages 1 and 2: those elements of a frozen parameter, whole on every rank, that lie where a fragment lies."""

    @property
    def value(self) -> Tensor:
        return self.parameter.data.view(-1)[self.span.start : self.span.stop]  # type: ignore[no-any-return]

    @property
    def grad(self) -> Tensor | None:
        return None

    def states(self) -> dict[str, Tensor]:
        return {}

    def beside(self, parameter: nn.Parameter) -> View:
        check_same_shape(self, self.experts.shape(parameter))
        return FragmentOfReplica(self.name, parameter, self.zero, self.span, self.experts)

    def publish(self) -> None:
        # Fragments cover the parameter without overlap, so the sum puts them together.
        data = self.parameter.data
        whole = torch.zeros_like(data.view(-1), dtype=torch.uint8 if data.dtype == torch.bool else data.dtype)
        whole[self.span.start : self.span.stop] = self.value
        group = self.experts.replicas if self.experts.is_part(self.parameter) else None
        data.copy_(reduced(whole, "sum", group).view(data.shape))


class WholeExpertsView(WholeView):
    """This rank's experts, not cut up: of any parameter in stage 0, of a frozen one in stages 1 and 2."""

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        experts: LocalExperts,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.experts = experts
        super().__init__(name, parameter, optimizer)

    def _piece(self) -> Box:
        sizes, shape = tuple(self.parameter.shape), tuple(self.experts.shape(self.parameter))
        first = self.experts.offset(self.parameter) // max(1, self.parameter[0].numel())
        return Box(shape, (first, *[0] * (len(shape) - 1)), sizes)

    def reduce(self, tensor: Tensor, op: Literal["sum", "max", "min"]) -> Tensor:
        return reduced(tensor, op, self.experts.sharers)

    def beside(self, parameter: nn.Parameter) -> View:
        check_same_shape(self, self.experts.shape(parameter))
        return WholeExpertsView(f"(beside {self.name})", parameter, self.experts)


class PartitionView(_FlatView):
    """Stage 3: this rank's equal share of the flattened parameter; the last ranks may have less, or nothing."""

    def __init__(self, name: str, parameter: Any, zero: ZeroState, experts: LocalExperts) -> None:
        total, share = parameter.ds_numel, parameter.ds_tensor.ds_numel
        start = min(partition_rank(parameter) * share, total)
        span = Span(tuple(parameter.ds_shape), start, min(start + share, total))
        super().__init__(name, parameter, zero, span, experts)

    @property
    def value(self) -> Tensor:
        if not self.parameter.requires_grad:
            return self._partition
        flat, _ = self.zero.optimizer._get_fp32_opt_state_partition(self.parameter, False)
        return flat.data[: self.num_held]  # type: ignore[no-any-return]

    @property
    def _partition(self) -> Tensor:
        """What forward gathers."""
        return self.parameter.ds_tensor.data.view(-1)[: self.num_held]  # type: ignore[no-any-return]

    @property
    def grad(self) -> Tensor | None:
        return super().grad if self.parameter.requires_grad else None

    def _gradient(self) -> Tensor:
        gradient, _ = self.zero.optimizer._get_fp32_grad_state_partition(self.parameter, False)
        return gradient[: self.num_held]  # type: ignore[no-any-return]

    def states(self) -> dict[str, Tensor]:
        if not self.parameter.requires_grad:
            return {}
        optimizer = self.zero.optimizer
        index, start, _ = optimizer.grad_position[optimizer.get_param_id(self.parameter)]
        return self._states_at(optimizer.fp32_partitioned_groups_flat[index], start)

    def beside(self, parameter: Any) -> View:
        check_same_shape(self, self.experts.shape(parameter))
        return PartitionView(f"(beside {self.name})", parameter, self.zero, self.experts)

    def publish(self) -> None:
        value = self.value
        if value.data_ptr() != self._partition.data_ptr():
            self._partition.copy_(value)
        if self.parameter.ds_status.name == "AVAILABLE":  # small ones stay gathered
            self.parameter.partition([self.parameter], has_been_updated=False)
            self.parameter.all_gather([self.parameter])


class ZeroViews(ModelViews):
    """Views under DeepSpeed.

    Args:
        model: The live causal LM.
        zero: What knows DeepSpeed's optimizer wrapper.
        experts: What knows which parameters are parts.
    """

    def __init__(self, model: nn.Module, zero: ZeroState, experts: LocalExperts) -> None:
        super().__init__(model)
        self._zero, self._experts = zero, experts

    def of(self, parameter: nn.Parameter) -> View:
        name, stage = self.name_of(parameter), self._zero.stage
        if stage == 3:
            return PartitionView(name, parameter, self._zero, self._experts)
        if stage == 0 or not parameter.requires_grad:
            if self._experts.is_part(parameter):
                optimizer = self._zero.base if stage == 0 else None
                return WholeExpertsView(name, parameter, self._experts, optimizer)
            return WholeView(name, parameter, self._zero.base)
        return FragmentView(name, parameter, self._zero, self._experts)

    def publish(self, views: Iterable[View]) -> None:
        flat = [view for view in views if isinstance(view, _FlatView)]
        if any(isinstance(view, FragmentView) for view in flat):
            self._zero.optimizer.update_lp_params()
        for view in flat:
            view.publish()
