"""Configuration of on-policy distillation. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from leanmill.core.technique import Installation, InstallContext, TechniqueConfig


if TYPE_CHECKING:
    from leanmill.core.sites import Sites


class OnPolicy(TechniqueConfig):
    """Distil on continuations that the student writes itself (GKD, Agarwal et al. 2023, arXiv:2306.13649)."""

    type: Literal["on_policy"] = "on_policy"
    """Name of the technique."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of rows, drawn one by one, that the student continues itself; the others stay as the data has them."""
    prompt_tokens: int | Literal["until_label"] = Field(default=32)
    """Tokens of a row that it continues. `until_label` takes those before the first that is to be predicted: the
    question of a conversation, with `data.task: sft`."""
    new_tokens: int | None = Field(default=None, ge=1)
    """Tokens that it adds, fewer where it ends the text; None fills the row. Each is a forward of the text so far."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the distribution that it draws from."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Add the rule that writes."""
        from leanmill.distill.on_policy.rule import OnPolicyRule

        rule = OnPolicyRule(
            context,
            share=self.share,
            prompt_tokens=None if self.prompt_tokens == "until_label" else self.prompt_tokens,
            new_tokens=self.new_tokens,
            temperature=self.temperature,
        )
        return Installation(step_rules=(rule,))

    def writes_text(self) -> bool:
        """It does."""
        return True

    def problems_with_rows_of(self, num_tokens: int) -> Iterable[str]:
        """Yield what has no room in a row."""
        if self.prompt_tokens == "until_label":
            return
        if not 1 <= self.prompt_tokens < num_tokens:
            yield (
                f"on_policy.prompt_tokens={self.prompt_tokens} must be between 1 and data.sequence_length={num_tokens} "
                f"less 1; set e.g. on_policy.prompt_tokens={max(1, num_tokens // 4)}"
            )
        elif self.new_tokens is not None and self.prompt_tokens + self.new_tokens > num_tokens:
            yield (
                f"on_policy.prompt_tokens={self.prompt_tokens} and new_tokens={self.new_tokens} are more than "
                f"data.sequence_length={num_tokens}; set on_policy.new_tokens={num_tokens - self.prompt_tokens}"
            )
