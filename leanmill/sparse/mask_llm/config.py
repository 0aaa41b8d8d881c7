"""Configuration of learned N:M masks. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig, WeightTechniqueConfig


if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from leanmill.core.site import Site
    from leanmill.core.sites import Sites

MAX_CANDIDATES = 256
_Positive = Annotated[float, Field(gt=0)]


class MaskLlm(TrainedTechniqueConfig, WeightTechniqueConfig):
    """Learn which N of every M weights to keep; the weights stay (MaskLLM: Fang et al. 2024, arXiv:2409.17481).

    Each group of M neighbours along the contraction dim has a logit for every way to keep N of them, or for each
    of its weights. Training samples a soft choice (Gumbel-softmax), evaluation and export take the likeliest.
    Nothing but the logits is trained. 2:4 has 1.5 logits a weight.
    """

    type: Literal["mask_llm"] = "mask_llm"
    """Name of the technique."""
    num_kept: int = Field(default=2, ge=1)
    """Weights kept of each group (N)."""
    group_size: int = Field(default=4, ge=2, le=64)
    """Neighbours along the last dim in a group (M); it must divide that dim of every target."""
    sampler: Literal["candidates", "draws"] = "candidates"
    """What is sampled: one of all ways to keep N of M, as published; or N weights one after another, with a logit a
    weight, for larger M (4:8 has 8.75 logits a weight else, 8:16 has 804)."""
    temperature: tuple[_Positive, _Positive] = (4.0, 0.05)
    """Temperature tau of the Gumbel-softmax at the first step and towards the last, linear in between."""
    scale: tuple[_Positive, _Positive] = (100.0, 500.0)
    """Factor kappa of the logits at the first step and towards the last, linear in between."""
    prior: Literal["magnitude", "pruned", "none"] = "magnitude"
    """Mask that the logits start from: the N largest magnitudes, the non-zero weights of `prior_model`
    (as `leanmill compress` with sparsegpt or wanda writes it), or none."""
    prior_model: str | None = None
    """Folder or hub name of the pruned copy of the model, for `prior: pruned`; read at every start of the run."""
    prior_strength: float = Field(default=3.0, ge=0)
    """Standard deviations alpha of the logits by which each weight in common with the prior lifts a candidate."""
    weight_regularisation: float = Field(default=1e-5, ge=0)
    """Factor lambda of the sum of squares of the kept weights, which is maximised; it falls to 0 linearly."""

    @model_validator(mode="after")
    def _has_candidates(self) -> MaskLlm:
        if self.num_kept >= self.group_size:
            raise ConfigError(
                f"num_kept {self.num_kept} of group_size {self.group_size} prunes nothing; "
                f"num_kept must be 1 to {self.group_size - 1}, or remove mask_llm"
            )
        num_candidates = math.comb(self.group_size, self.num_kept)
        if self.sampler == "candidates" and num_candidates > MAX_CANDIDATES:
            raise ConfigError(
                f"mask_llm: there are {num_candidates} ways to keep {self.num_kept} of {self.group_size}, each with a "
                f"logit in every group, and {MAX_CANDIDATES} are allowed; set sampler: draws, which has one a weight"
            )
        return self

    @model_validator(mode="after")
    def _prior_model_belongs_to_pruned(self) -> MaskLlm:
        if (self.prior == "pruned") != (self.prior_model is not None):
            raise ConfigError(
                f"mask_llm with prior {self.prior} and prior_model {self.prior_model}; set prior: pruned and "
                f"prior_model: FOLDER together, or neither"
            )
        return self

    def read_models(self) -> Mapping[str, str]:
        return {} if self.prior_model is None else {"prior_model": self.prior_model}

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put a learned mask on every target and freeze the weights.

        Raises:
            ConfigError: `group_size` does not divide the last dim of a target, or there is no seed.
        """
        from leanmill.core.noise import FreshNoise
        from leanmill.sparse.mask_llm.stage import AnnealMasks, DrawnMaskStage, MaskLlmStage, Schedule

        selected = sites.select(self.targets, self.exclude)
        for site in selected:
            shape = site.raw_weight.shape
            if shape[-1] % self.group_size:
                raise ConfigError(
                    f"{site.site_name}: group_size {self.group_size} does not divide the last dim of its weight "
                    f"{list(shape)}; add {site.site_name!r} to mask_llm.exclude or choose a group_size that divides "
                    f"{shape[-1]}"
                )
        rules = (FreshNoise(sites.model, context.seed, self.type), AnnealMasks(sites.model))
        schedule = Schedule(self.temperature, self.scale, self.weight_regularisation)
        find_prior = self._prior(context)
        make = MaskLlmStage if self.sampler == "candidates" else DrawnMaskStage
        sites.put(
            selected,
            lambda site: make(
                site.site_name,
                site.raw_weight,
                self.num_kept,
                self.group_size,
                schedule,
                prior=find_prior(site),
                prior_strength=self.prior_strength,
            ),
        )
        return Installation(step_rules=rules, freeze_base=True)

    def _prior(self, context: InstallContext) -> Callable[[Site], Callable[[Tensor], Tensor] | None]:
        """Return what gives a site the function from its weight to the mask that its logits start from."""
        from leanmill.kernels.nm_mask.op import nm_mask

        if self.prior == "magnitude":
            return lambda site: partial(nm_mask, num_kept=self.num_kept, group_size=self.group_size)
        # Without a way to read, the logits are overwritten by a checkpoint's.
        if self.prior_model is None or context.open_weights is None:
            return lambda site: None
        read = context.open_weights(self.prior_model)
        return lambda site: partial(self._kept_in_copy, read, site.weight_name)

    def _kept_in_copy(self, read: Callable[[str, Tensor], Tensor], name: str, weight: Tensor) -> Tensor:
        kept = read(name, weight) != 0
        if kept.all():
            raise ConfigError(
                f"mask_llm.prior_model={self.prior_model} holds no zeros in {name}, so it is no prior for its mask; "
                f"give a copy that `leanmill compress` pruned, or add {name.removesuffix('.weight')!r} to "
                f"mask_llm.exclude"
            )
        return kept
