"""Sites: places with a weight `[..., out, in]` that own their matmul and carry stages.

A site replaces a plain module in place and shares its parameter under the same key, so checkpoints
of the plain model load unchanged. Where an engine has not staged it ahead for the whole step
(`leanmill.core.staging`), the staged weight is recomputed in backward (`recomputed`), so what is kept
alive between forward and backward does not grow with the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.expert_shards import part_here
from leanmill.core.operands import Operands, lend, recomputed
from leanmill.core.product import compute_dtype, linear
from leanmill.core.stage import InputSlot, InputStage, Slot, Stage
from leanmill.core.weight_split import WeightSplit, split_linear, split_lookup, staged_part


class Site(ABC):
    """What all sites share. Mixed into the `nn.Module` that stands in the model."""

    stages: nn.ModuleDict
    """Weight stages by slot."""
    inputs: nn.ModuleDict
    """Stages of the activations by slot."""
    site_name: str
    """Dotted name of the weight's owner in the plain model, e.g. `model.layers.0.mlp.up_proj`."""
    takes_inputs: ClassVar[bool] = True
    """Whether activations enter a matmul here; a table of rows has none."""
    held: Tensor | None = None
    """The staged weight of this optimizer step, where an engine staged it ahead of its uses."""
    arrives_staged: bool = False
    """Whether the weight that a sharding engine gathers for a forward is the staged one."""
    split: WeightSplit | None = None
    """How ranks share the weight, where they do; a copy with whole tensors is not to be called."""
    leaves_deltas_out: bool = False
    """Whether forwards do without the tenants of `Slot.DELTA` for now, see `leanmill.core.adapters`."""

    @property
    @abstractmethod
    def raw_weight(self) -> Tensor:
        """The live parameter that the optimizer writes."""

    @property
    def weight_at(self) -> tuple[nn.Module, str]:
        """The module that holds the weight, and under which key."""
        return self, "weight"  # type: ignore[return-value]

    @property
    def weight_name(self) -> str:
        """Dotted name of the weight in the plain model."""
        return f"{self.site_name}.weight"

    @abstractmethod
    def fold(self) -> nn.Module:
        """Return a plain module whose weight is `folded_weight()`, free of stages."""

    def put(self, stage: Stage) -> None:
        """Give `stage` its slot on this site.

        Raises:
            ConfigError: The slot is taken; the message names both techniques.
        """
        key = stage.slot.key
        if stage.slot.is_shared:
            taken = sum(name.split("_")[0] == key for name in self.stages)
            key = f"{key}_{taken + 1}" if taken else key
        elif key in self.stages:
            raise ConfigError(self._taken(f"{stage.slot.name} slot", self.stages[key].technique, stage.technique))
        self.stages[key] = stage

    def put_input(self, stage: InputStage) -> None:
        """Give `stage` its slot on the activations that enter this site.

        Raises:
            ConfigError: The slot is taken, or no activations enter a matmul here.
        """
        if not self.takes_inputs:
            raise ConfigError(
                f"{self.site_name} looks rows up and multiplies no activations, which {stage.technique!r} stages; "
                f"add {self.site_name!r} to {stage.technique}.exclude"
            )
        key = stage.slot.key
        if key in self.inputs:
            name = f"{stage.slot.name} slot of the activations"
            raise ConfigError(self._taken(name, self.inputs[key].technique, stage.technique))
        self.inputs[key] = stage

    def _taken(self, slot: str, tenant: Any, other: str) -> str:
        return (
            f"{self.site_name}: the {slot} is taken by {tenant!r}, so {other!r} cannot use it too; "
            f"remove one of them from `techniques`, or give them different `targets`"
        )

    def stage(self, slot: Slot) -> Stage | None:
        """Return the (first) tenant of `slot`, if any."""
        return self.stages._modules.get(slot.key)  # type: ignore[return-value]

    def take_off(self, slot: Slot) -> None:
        """Remove every tenant of `slot`."""
        for key in [key for key in self.stages if key.split("_")[0] == slot.key]:
            del self.stages[key]

    def weight_stages(self) -> list[Stage]:
        """Every weight stage, in slot order."""
        return sorted(self.stages.values(), key=lambda stage: stage.slot)  # type: ignore[arg-type, return-value]

    def input_stages(self) -> list[InputStage]:
        """Every stage of the activations, in slot order."""
        return [self.inputs[slot.key] for slot in InputSlot if slot.key in self.inputs]  # type: ignore[misc]

    @property
    def is_staged(self) -> bool:
        """Whether anything happens to an operand here."""
        return bool(self.stages) or bool(self.inputs)

    @property
    def is_reshaped(self) -> bool:
        """Whether a technique stages an operand here."""
        return bool(self.inputs) or any(stage.slot is not Slot.COMPACT for stage in self.weight_stages())

    def stage_parameters(self) -> Iterator[nn.Parameter]:
        """What the stages of both operands brought."""
        yield from self.stages.parameters()
        yield from self.inputs.parameters()

    def effective_weight(self) -> Tensor:
        """Run the stages on the live weight, in slot order: what the matmul of training uses."""
        weight = self.raw_weight
        for stage in self.weight_stages():
            weight = stage(weight)
        return weight

    def folded_weight(self) -> Tensor:
        """The weight of a plain layer that computes the same: `effective_weight`, rotated back. What export writes."""
        weight = self.effective_weight()
        for stage in reversed(self.weight_stages()):
            weight = stage.undo(weight)
        return weight

    def operands(self) -> Operands:
        """Capture what the staged matmul needs, as of now."""
        if self.arrives_staged:
            return Operands(self._weight_here, (), self.input_stages())
        if self.held is not None:
            return Operands(lend(self._weight_here, self.held), (), self.input_stages())
        return Operands(self._weight_here, self._stages_here(), self.input_stages())

    def _stages_here(self) -> list[Stage]:
        stages = self.weight_stages()
        return [stage for stage in stages if stage.slot is not Slot.DELTA] if self.leaves_deltas_out else stages

    @property
    def _weight_here(self) -> Tensor:
        """What of the weight a matmul here takes."""
        return self.raw_weight if self.split is None else part_here(self.raw_weight)


class LinearSite(Site, nn.Linear):
    """A linear layer `[out, in]` with stages; still an `nn.Linear` to whoever asks."""

    @classmethod
    def adopt(cls, module: nn.Linear, name: str) -> LinearSite:
        """Build the site around `module`'s own parameters."""
        site = cls(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        site.weight, site.bias = module.weight, module.bias
        site.stages, site.inputs, site.site_name = nn.ModuleDict(), nn.ModuleDict(), name
        site.train(module.training)
        return site

    @property
    def raw_weight(self) -> Tensor:
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Linear uses)
        """Apply the staged weight to the staged `input` [..., in]."""
        if self.split is not None:
            bias = None if self.bias is None else part_here(self.bias)
            return split_linear(self.split, input, self.operands(), bias)
        if not self.is_staged:
            return F.linear(input, self.weight, self.bias)
        operands = self.operands()
        if operands.is_plain:
            return F.linear(input, operands.tensors[0], self.bias)
        if operands.has_product:
            return operands.product(input.to(compute_dtype(input)), self.bias)

        def product(tokens: Tensor, bias: Tensor | None, *tensors: Tensor) -> Tensor:
            bound = operands.bound(tensors)
            return bound.product(linear(bound.tokens(tokens), bound.weight(), bound.backward_weight(), bias))

        return recomputed(product, input, self.bias, *operands.tensors)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.folded_weight().detach().clone(), self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)


class EmbeddingSite(Site, nn.Embedding):
    """An embedding table `[num_embeddings, embedding_dim]` with stages."""

    takes_inputs: ClassVar[bool] = False

    @classmethod
    def adopt(cls, module: nn.Embedding, name: str) -> EmbeddingSite:
        """Build the site around `module`'s own table."""
        if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
            raise ConfigError(
                f"{name}: an embedding with max_norm, sparse or scale_grad_by_freq cannot carry stages; "
                f"add {name!r} to `exclude`"
            )
        site = cls(module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta")
        site.weight = module.weight
        site.stages, site.inputs, site.site_name = nn.ModuleDict(), nn.ModuleDict(), name
        site.train(module.training)
        return site

    @property
    def raw_weight(self) -> Tensor:
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Embedding uses)
        """Look `input` [...] int64 up in the staged table."""
        if self.split is not None:
            return self._split_lookup(self.split, input)
        if not self.is_staged:
            return self._lookup(input, self.weight)
        operands = self.operands()
        if operands.is_plain:
            return self._lookup(input, operands.tensors[0])

        if operands.is_decoded_only:  # of the rows looked up, not of all
            return operands.stages[0](self._lookup(input, operands.tensors[0]))

        def lookup(ids: Tensor, *tensors: Tensor) -> Tensor:
            return self._lookup(ids, operands.bound(tensors).weight())

        return recomputed(lookup, input, *operands.tensors)

    def _split_lookup(self, split: WeightSplit, ids: Tensor) -> Tensor:
        operands = self.operands()

        def lookup(ids: Tensor, *tensors: Tensor) -> Tensor:
            return split_lookup(split, ids, staged_part(split, operands, tensors), self.padding_idx)

        return lookup(ids, *operands.tensors) if operands.is_plain else recomputed(lookup, ids, *operands.tensors)

    def _lookup(self, input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002
        return F.embedding(input, weight, self.padding_idx)

    @torch.no_grad()
    def fold(self) -> nn.Embedding:
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")
        plain.weight = nn.Parameter(self.folded_weight().detach().clone(), self.weight.requires_grad)
        return plain.train(self.training)


class ExpertSite(Site, nn.Module):
    """One stacked weight `[num_experts, out, in]` of an experts module.

    The parameter stays on the experts module under its own key; the site hangs below it as
    `sites.<parameter name>` and holds the stages only. Compute reaches it through
    `leanmill.core.experts`.
    """

    def __init__(self, owner: nn.Module, parameter_name: str, name: str) -> None:
        super().__init__()
        # In __dict__ past nn.Module's registration: the owner is the parent, and a registered
        # parent would be a cycle. deepcopy and pickle follow plain attributes correctly.
        self.__dict__["_owner"] = owner
        self.parameter_name = parameter_name
        self.stages, self.inputs, self.site_name = nn.ModuleDict(), nn.ModuleDict(), name

    @property
    def raw_weight(self) -> Tensor:
        return getattr(self.__dict__["_owner"], self.parameter_name)  # type: ignore[no-any-return]

    @property
    def weight_at(self) -> tuple[nn.Module, str]:
        return self.__dict__["_owner"], self.parameter_name

    @property
    def weight_name(self) -> str:
        return self.site_name

    @property
    def _weight_here(self) -> Tensor:
        return part_here(self.raw_weight)

    def operands(self) -> Operands:
        return super().operands().on_this_rank()

    def forward(self) -> Tensor:
        """Return the raw weight; a call rather than a method so that sharding hooks run."""
        return self.raw_weight

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Write the staged weight into the owner and take the stages off; return the owner."""
        owner = self.__dict__["_owner"]
        folded = nn.Parameter(self.folded_weight().detach().clone(), self.raw_weight.requires_grad)
        setattr(owner, self.parameter_name, folded)
        self.stages = nn.ModuleDict()
        return owner  # type: ignore[no-any-return]
