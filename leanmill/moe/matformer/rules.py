"""Which sub-models a step trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from leanmill.core.batches import Batch, BatchRule, Score
from leanmill.core.branches import base_of, branched_layers
from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed
from leanmill.core.rules import StepContext, StepRule
from leanmill.moe.matformer.around import NestedWidth


class DrawnWidth(StepRule):
    """Draws one granularity a step for all layers, from the run's seed and the step: alike on all ranks and on resume.

    Args:
        model: For `check`.
        arounds: Of all MLPs.
        granularities: Divisors.
        probabilities: Of each, up to a factor.
        seed: The run's.
    """

    name = "matformer"

    def __init__(
        self,
        model: nn.Module,
        arounds: Sequence[NestedWidth],
        granularities: Sequence[int],
        probabilities: Sequence[float],
        seed: int,
    ) -> None:
        self.model, self.arounds, self.granularities, self.seed = model, arounds, granularities, seed
        self.probabilities = [value / sum(probabilities) for value in probabilities]
        self._drawn = 1

    def check(self) -> None:
        check_branches(self.model)

    def begin_step(self, context: StepContext) -> None:
        left = derive_seed(self.seed, "matformer", context.step) / 2**63
        self._drawn = self.granularities[-1]
        for granularity, probability in zip(self.granularities, self.probabilities, strict=True):
            if left < probability:
                self._drawn = granularity
                break
            left -= probability
        for around in self.arounds:
            around.widths.fill_(around.width // self._drawn)

    def metrics(self) -> Mapping[str, float]:
        return {"width_share": 1 / self._drawn}


class AllWidths(BatchRule):
    """Repeats the rows of every micro-batch for each granularity; the mean over all rows is the mean over sub-models.

    Args:
        model: For `check`.
        num_parts: Granularities.
    """

    name = "matformer"

    def __init__(self, model: nn.Module, num_parts: int) -> None:
        self.model, self.num_parts = model, num_parts

    def check(self) -> None:
        check_branches(self.model)

    def change_batches(self, batches: Sequence[Batch], context: StepContext, score: Score) -> Sequence[Batch]:
        return [
            {name: tensor.repeat(self.num_parts, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
            for batch in batches
        ]


def check_branches(model: nn.Module) -> None:
    """Refuse output branches beside a nested projection, which would see all neurons.

    Raises:
        ConfigError: There is one.
    """
    for path, layer in branched_layers(model):
        if any(isinstance(module, NestedWidth) for module in base_of(layer).modules()):
            raise ConfigError(
                f"{path}: an output branch beside it sees the neurons that matformer leaves out; type where: weight "
                f"for lora, or add {path!r} to lora.exclude"
            )
