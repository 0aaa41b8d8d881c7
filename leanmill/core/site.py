"""Sites: places with a weight `[..., out, in]` that own their matmul and carry stages.

A site replaces a plain module in place and shares its parameter under the same key, so checkpoints
of the plain model load unchanged. The staged weight is recomputed in backward (`recomputed`), so
what is kept alive between forward and backward does not grow with the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from leanmill.core.errors import ConfigError
from leanmill.core.stage import Slot, Stage


def recomputed(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """Run `function` so that nothing it computes from the weights is kept for backward.

    Non-reentrant checkpointing stops recomputing at the last tensor that backward needs; a matmul
    saves its operands before it runs, so the matmul itself is not repeated.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(  # type: ignore[no-any-return]
        function, *args, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )


class Site(ABC):
    """What all sites share. Mixed into the `nn.Module` that stands in the model."""

    stages: nn.ModuleDict
    site_name: str
    """Dotted name of the weight's owner in the plain model, e.g. `model.layers.0.mlp.up_proj`."""

    @property
    @abstractmethod
    def raw_weight(self) -> Tensor:
        """The live parameter that the optimizer writes."""

    @abstractmethod
    def fold(self) -> nn.Module:
        """Return a plain module whose weight is `effective_weight()`, free of stages."""

    def put(self, stage: Stage) -> None:
        """Give `stage` its slot on this site.

        Raises:
            ConfigError: The slot is taken; the message names both techniques.
        """
        key = stage.slot.key
        if key in self.stages:
            raise ConfigError(
                f"{self.site_name}: the {stage.slot.name} slot is taken by "
                f"{self.stages[key].technique!r}, so {stage.technique!r} cannot use it too; "
                f"remove one of them from `techniques`, or give them different `targets`"
            )
        self.stages[key] = stage

    def stage(self, slot: Slot) -> Stage | None:
        """Return the tenant of `slot`, if any."""
        return self.stages._modules.get(slot.key)  # type: ignore[return-value]

    def effective_weight(self) -> Tensor:
        """Run the stages on the live weight, in slot order; what training uses and export writes."""
        weight = self.raw_weight
        for slot in Slot:
            if slot.key in self.stages:
                weight = self.stages[slot.key](weight)
        return weight


class LinearSite(Site, nn.Linear):
    """A linear layer `[out, in]` with stages; still an `nn.Linear` to whoever asks."""

    @classmethod
    def adopt(cls, module: nn.Linear, name: str) -> LinearSite:
        """Build the site around `module`'s own parameters."""
        site = cls(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
        site.weight, site.bias = module.weight, module.bias
        site.stages, site.site_name = nn.ModuleDict(), name
        site.train(module.training)
        return site

    @property
    def raw_weight(self) -> Tensor:
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Linear uses)
        """Apply the staged weight to `input` [..., in]."""
        if not self.stages:
            return F.linear(input, self.weight, self.bias)
        return recomputed(self._staged_forward, input)

    def _staged_forward(self, input: Tensor) -> Tensor:  # noqa: A002
        # A sharding engine that computes in bf16 hands over what is staged in fp32.
        return F.linear(input, self.effective_weight().to(input.dtype), self.bias)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.effective_weight().detach().clone(), self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)


class EmbeddingSite(Site, nn.Embedding):
    """An embedding table `[num_embeddings, embedding_dim]` with stages."""

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
        site.stages, site.site_name = nn.ModuleDict(), name
        site.train(module.training)
        return site

    @property
    def raw_weight(self) -> Tensor:
        return self.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name nn.Embedding uses)
        """Look `input` [...] int64 up in the staged table."""
        return recomputed(self._staged_forward, input) if self.stages else self._lookup(input, self.weight)

    def _staged_forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self._lookup(input, self.effective_weight())

    def _lookup(self, input: Tensor, weight: Tensor) -> Tensor:  # noqa: A002
        return F.embedding(input, weight, self.padding_idx)

    @torch.no_grad()
    def fold(self) -> nn.Embedding:
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, device="meta")
        plain.weight = nn.Parameter(self.effective_weight().detach().clone(), self.weight.requires_grad)
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
        self.stages, self.site_name = nn.ModuleDict(), name

    @property
    def raw_weight(self) -> Tensor:
        return getattr(self.__dict__["_owner"], self.parameter_name)  # type: ignore[no-any-return]

    def forward(self) -> Tensor:
        """Return the staged weight; a call rather than a method so that sharding hooks run."""
        return self.effective_weight()

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """Write the staged weight into the owner and take the stages off; return the owner."""
        owner = self.__dict__["_owner"]
        folded = nn.Parameter(self.effective_weight().detach().clone(), self.raw_weight.requires_grad)
        setattr(owner, self.parameter_name, folded)
        self.stages = nn.ModuleDict()
        return owner  # type: ignore[no-any-return]
