"""Configuration of multi-token prediction. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TrainedTechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class MultiToken(TrainedTechniqueConfig):
    """Predict more than the next token in training, each further one by a block of its own behind the model.

    DeepSeek-AI 2024, arXiv:2412.19437, section 2.2.
    """

    type: Literal["multi_token"] = "multi_token"
    """Name of the technique."""
    depth: int = Field(default=1, ge=1, le=16)
    """Further tokens that every position predicts, and blocks for them."""
    weight: float = Field(default=0.3, gt=0)
    """Weight of the mean of the further cross-entropies in the objective."""
    late_weight: float | None = Field(default=None, gt=0)
    """Weight in the last part of the run; None keeps `weight`. DeepSeek-V3 goes from 0.3 to 0.1."""
    late_from: float = Field(default=0.68, ge=0, le=1)
    """Share of the run's steps after which `late_weight` holds; DeepSeek-V3: 10T of 14.8T tokens."""

    def further_tokens(self) -> int:
        """Return `depth`."""
        return self.depth

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Stand behind the model's last norm.

        Raises:
            ConfigError: The family's blocks or what follows them have another form.
        """
        from leanmill.architecture.multi_token.install import install

        rule = install(
            sites,
            context.ledger,
            depth=self.depth,
            weight=self.weight,
            late_weight=self.weight if self.late_weight is None else self.late_weight,
            late_from=self.late_from,
        )
        return Installation(step_rules=[rule])
