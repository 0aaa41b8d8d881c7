"""Surgeries that give a model experts. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig


class Upcycle(SurgeryConfig):
    """Make experts of the MLPs of a dense model (Komatsuzaki et al. 2022, arXiv:2212.05055).

    With a granularity above 1 every expert is a shard of the MLP and the router begins in virtual groups (He et
    al. 2024, arXiv:2410.07524), but the scale that keeps the function goes on `down_proj` as a whole: the
    paper's cube root on all three matrices does not keep that of SwiGLU.
    """

    type: Literal["upcycle"] = "upcycle"
    """Name of the pass."""
    num_experts: int = Field(ge=2)
    """Experts of a layer, shards counted one by one; a multiple of `granularity`."""
    top_k: int = Field(ge=1)
    """Experts that a token goes through; a multiple of `granularity`, so that it goes through whole MLPs."""
    granularity: int = Field(default=1, ge=1)
    """Shards G that the MLP is cut into: expert i is shard i mod G."""
    normalised: bool = True
    """Whether the weights of the chosen experts sum to 1 (`norm_topk_prob`): then the model computes exactly what the
    dense one did. Otherwise they are a part of the softmax over all experts, and it does so up to the router's
    deviations from equal probabilities."""
    router_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the router's weights."""
    first_dense_layers: int = Field(default=0, ge=0)
    """Layers at the beginning that stay dense."""
    moe_every: int = Field(default=1, ge=1)
    """Of the layers after that only every n-th gets experts: those whose number, from 1, is a multiple of n."""
    shared_intermediate_size: int | None = Field(default=None, ge=1)
    """Neurons of the dense MLP that become the shared expert; the rest are cut into shards. For families that have
    one, which want it."""
    reinitialised_share: float = Field(default=0.0, ge=0, le=1)
    """Share of each expert that is drawn anew, so that copies differ from the start; above 0 the model computes
    something else than the dense one."""
    reinitialise: Literal["neurons", "weights"] = "neurons"
    """`neurons`: whole neurons, from a normal distribution with mean and deviation of the weights they had
    (Drop-Upcycling, Nakamura et al. 2025, arXiv:2502.19261). `weights`: single weights, with `reinitialised_std`
    (OLMoE, Muennighoff et al. 2024, arXiv:2409.02060)."""
    reinitialised_std: float = Field(default=0.02, gt=0)
    """Standard deviation for `reinitialise: weights`."""

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Upcycle:
        if self.top_k > self.num_experts:
            raise ConfigError(
                f"upcycle: top_k={self.top_k} of num_experts={self.num_experts}; type top_k of at most that"
            )
        for key in ("num_experts", "top_k"):
            given, size = getattr(self, key), self.granularity
            if given % size:
                raise ConfigError(
                    f"upcycle: {key}={given} is no multiple of granularity={size}, so some token would go through a "
                    f"part of the MLP; type {key}={-(-given // size) * size}"
                )
        return self

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.moe.upcycle.dense import DenseToExperts, Redrawn

        redrawn = Redrawn(share=self.reinitialised_share, what=self.reinitialise, std=self.reinitialised_std)
        return DenseToExperts(
            num_experts=self.num_experts,
            top_k=self.top_k,
            granularity=self.granularity,
            normalised=self.normalised,
            router_std=self.router_std,
            first_dense_layers=self.first_dense_layers,
            moe_every=self.moe_every,
            shared_size=self.shared_intermediate_size,
            redrawn=redrawn,
            seed=seed,
        )


class ExpertUpcycle(SurgeryConfig):
    """Give a mixture copies of its experts (Dwivedi et al. 2026, arXiv:2604.19835)."""

    type: Literal["expert_upcycle"] = "expert_upcycle"
    """Name of the pass."""
    factor: int = Field(default=2, ge=2)
    """How many times as many experts there will be."""
    copies: Literal["equal", "gradient", "saliency"] = "equal"
    """Which experts are copied: `equal` all as often, expert i of E becoming i, E + i, 2E + i, ...; `gradient` those of
    the largest squared norm of their gradient on calibration rows, `saliency` of its norm times that of their weights.
    The last two hold the whole model in memory, and its experts' gradients."""
    most_copies: int = Field(default=3, ge=1)
    """Copies of one expert at most, itself not counted, where not all get equally many; the paper's 3."""
    top_k: int | None = Field(default=None, ge=1)
    """Experts that a token goes through; None leaves it as it is. Only `factor` times as many keep the function of a
    model whose weights of chosen experts sum to 1, with `router_noise: 0`."""
    router_noise: float = Field(default=0.01, ge=0)
    """Standard deviation of the noise on the copies' rows of the router, as a share of that of its weights."""

    @property
    def reads_gradients(self) -> bool:
        return self.copies != "equal"

    @model_validator(mode="after")
    def _finds_enough_to_copy(self) -> ExpertUpcycle:
        if self.copies != "equal" and self.most_copies < self.factor - 1:
            raise ConfigError(
                f"expert_upcycle: with most_copies={self.most_copies} there are at most {1 + self.most_copies} times "
                f"as many experts, and factor={self.factor}; type most_copies={self.factor - 1} or more"
            )
        # By value: a saved recipe names every key.
        if self.copies == "equal" and self.most_copies != type(self).model_fields["most_copies"].default:
            raise ConfigError(
                "expert_upcycle.most_copies is for copies of some experts more than of others; remove it, or set "
                "copies: gradient"
            )
        return self

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.moe.upcycle.copies import MoreExperts

        return MoreExperts(
            factor=self.factor,
            copies=self.copies,
            most_copies=self.most_copies,
            top_k=self.top_k,
            router_noise=self.router_noise,
            seed=seed,
        )
