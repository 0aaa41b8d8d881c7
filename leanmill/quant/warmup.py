"""From full precision to rounded operands, a little more with every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from leanmill.core.lengths import steps_of
from leanmill.core.rules import StepContext, StepRule
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import OperandStage


class WarmedUp(OperandStage):
    """Mixed into quantisers: what they return lies between their input and what it is rounded to.

    With lambda in [0, 1], x becomes x + lambda (Q(x) - x), and so does its gradient; where Q passes gradients
    straight through, they pass unchanged (Hugging Face 2024, *Fine-tuning LLMs to 1.58bit*). lambda is saved with
    the model, so that an evaluation or an export uses the operands that training used.

    Args:
        has_warmup: Whether there is a lambda; it starts at 0, and a step rule raises it. Without one it is 1.
        device: Of the weight.
    """

    strength: Tensor | None
    """(1,): lambda."""

    def __init__(self, *, has_warmup: bool, device: torch.device | None) -> None:
        super().__init__()
        self.register_buffer("strength", torch.zeros(1, device=device) if has_warmup else None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.strength is not None:
            self.strength.zero_()

    @property
    def is_mixed(self) -> bool:
        """Whether lambda may lie below 1; a value read once training is over."""
        return self.strength is not None and bool(self.strength < 1)

    def mixed(self, values: Tensor, rounded: Tensor) -> Tensor:
        """Return what lies between; exactly `rounded` at lambda 1."""
        if self.strength is None:
            return rounded
        return torch.lerp(values, rounded, self.strength.to(values.dtype))


class RaiseStrength(StepRule):
    """Raises lambda of one technique's stages linearly, from 0 in the first step to 1 after the warm-up.

    Args:
        model: Whose sites are walked.
        technique: Whose stages.
        warmup_steps: Steps (int), or a share of the run (float below 1) that comes to a step at least; above 0.
    """

    def __init__(self, model: nn.Module, technique: str, warmup_steps: int | float) -> None:
        self.model, self.technique, self.warmup_steps = model, technique, warmup_steps
        self.name = f"{technique}_warmup"
        self.strength = 0.0

    def begin_step(self, context: StepContext) -> None:
        self.strength = min(1.0, context.step / steps_of(self.warmup_steps, context.num_steps, at_least=1))
        for stage in self._stages():
            if stage.strength is not None:
                stage.strength.fill_(self.strength)

    def metrics(self) -> Mapping[str, float]:
        return {"strength": self.strength}

    def _stages(self) -> Iterator[WarmedUp]:
        for _, site in iter_sites(self.model):
            for stage in (*site.weight_stages(), *site.input_stages()):
                if isinstance(stage, WarmedUp) and stage.technique == self.technique:
                    yield stage


def warmup_rules(sites: Sites, technique: str, warmup_steps: int | float) -> tuple[StepRule, ...]:
    """Return the step rule of a technique's warm-up, where it has one."""
    return (RaiseStrength(sites.model, technique, warmup_steps),) if warmup_steps else ()
