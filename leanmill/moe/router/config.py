"""Configuration of what routers do otherwise. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class GroupsConfig(Config):
    """Neighbouring experts in equal groups, of which a token may choose from the best."""

    num_groups: int = Field(ge=2)
    """Groups; a divisor of the number of experts. Devices of DeepSeek-V2, nodes of V3."""
    open_groups: int = Field(ge=1)
    """Groups that a token may choose from."""
    score: Literal["best", "best_two"] = "best"
    """What groups are compared by: the best score in each (DeepSeek-V2), or the sum of the best two (V3)."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.open_groups >= self.num_groups:
            raise ConfigError(
                f"router.groups: {self.open_groups} open of {self.num_groups} groups limits nothing; set open_groups "
                f"below num_groups, or remove groups"
            )
        return self


class ExpertChoiceConfig(Config):
    """Experts choose tokens, instead of tokens experts (Zhou et al. 2022, arXiv:2202.09368)."""

    experts_a_token: float | None = Field(default=None, gt=0)
    """Experts of a token on average; None is the model's top_k."""
    at_most: int | None = Field(default=None, ge=1)
    """Experts of one token at most, its best; None is twice the model's top_k. Memory is set aside for that many."""
    over: Literal["sequence", "micro_batch"] = "sequence"
    """What an expert chooses from: the tokens of one sequence, or of a rank's micro-batch."""


class MaskMoeConfig(Config):
    """Tokens see some experts only, by how often they occur (Su et al. 2024, arXiv:2407.09816)."""

    counts: str
    """A `.npy` file with how often each token of the vocabulary occurs in the training data."""
    frequent_share: float = Field(default=0.8, gt=0, lt=1)
    """Frequent are the tokens of largest count that make up this share of all occurrences."""
    visible_experts: int = Field(default=8, ge=2)
    """Experts that a frequent token sees, drawn once; others see one. At most the model's."""


class Router(TechniqueConfig):
    """Change how a mixture's routers decide, in fp32.

    Jitter and capacity: Fedus et al. 2021, arXiv:2101.03961; groups: DeepSeek-AI 2024, arXiv:2405.04434 and 2412.19437.
    """

    type: Literal["router"] = "router"
    """Name of the technique."""
    jitter: float = Field(default=0.0, ge=0, lt=1)
    """In training, each element of what a router sees is multiplied by a number of 1 - jitter to 1 + jitter."""
    capacity_factor: float | None = Field(default=None, gt=0)
    """In training, an expert takes this many times its equal share of copies and drops the others; None drops
    nothing, as does evaluation."""
    drop: Literal["probability", "position"] = "probability"
    """What is dropped where there is no room: copies of least affinity, or the last ones."""
    capacity_over: Literal["sequence", "micro_batch"] = "micro_batch"
    """Which tokens share an expert's room: those of a rank's micro-batch, or of each sequence alone, which does not
    depend on ranks and sizes of micro-batches."""
    groups: GroupsConfig | None = None
    """Limits tokens to groups of experts, in evaluation too, for models whose routers do not already; None does not."""
    expert_choice: ExpertChoiceConfig | None = None
    """Experts choose tokens, in evaluation too; None lets tokens choose."""
    mask_moe: MaskMoeConfig | None = None
    """Closes experts to tokens by how often they occur, in evaluation too; None closes none."""

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        for name in ("capacity_factor", "groups"):
            if self.expert_choice is not None and getattr(self, name) is not None:
                raise ConfigError(
                    f"router: with expert_choice experts take equally many tokens of their choice, so there is nothing "
                    f"for {name} to limit; remove one of the two"
                )
        for name in ("drop", "capacity_over"):
            # By value: a saved recipe names every key.
            if self.capacity_factor is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"router.{name} says how capacity is kept to, which is not set; set capacity_factor")
        return self

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand a decision around every router and give it the options.

        Raises:
            ConfigError: The model has no routers that are understood, or not the experts that an option needs.
        """
        from leanmill.moe.router.install import install

        choice, mask, groups = self.expert_choice, self.mask_moe, self.groups
        rules = install(
            sites,
            context,
            jitter=self.jitter,
            capacity=None if self.capacity_factor is None else (self.capacity_factor, self.drop, self.capacity_over),
            groups=None if groups is None else (groups.num_groups, groups.open_groups, 1 + (groups.score != "best")),
            choice=None if choice is None else (choice.experts_a_token, choice.at_most, choice.over),
            mask=None if mask is None else (mask.counts, mask.frequent_share, mask.visible_experts),
        )
        return Installation(step_rules=rules)
