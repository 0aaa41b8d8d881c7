"""Rates and exits of a step, written before its first forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leanmill.architecture.stochastic_depth.around import DroppedBlock
from leanmill.architecture.stochastic_depth.early_exit import EarlyExit, Exits
from leanmill.architecture.stochastic_depth.schedule import (
    Curriculum,
    OverLayers,
    OverTime,
    exit_weights,
    layer_factor,
    time_factor,
)
from leanmill.core.batches import Batch
from leanmill.core.ledger import Ledger
from leanmill.core.noise import derive_seed
from leanmill.core.rules import StepContext, StepRule


class DropRule(StepRule):
    """Writes the rate of every block, and decides for those that are dropped by batch.

    Args:
        blocks: Of all layers, in order.
        seed: The run's.
        rate: The largest of any layer and step.
        over_layers: See `layer_factor`.
        over_time: See `time_factor`.
    """

    name = "stochastic_depth"

    def __init__(
        self,
        blocks: Sequence[DroppedBlock],
        seed: int,
        *,
        rate: float,
        over_layers: OverLayers,
        over_time: OverTime,
    ) -> None:
        self.blocks, self.seed, self.over_time = blocks, seed, over_time
        self.rates = [rate * layer_factor(layer, len(blocks), over_layers) for layer in range(len(blocks))]
        self._factor = 0.0

    def begin_step(self, context: StepContext) -> None:
        self._factor = time_factor(context.step, context.num_steps, self.over_time)
        for block, rate in zip(self.blocks, self.rates, strict=True):
            block.rate.fill_(self._factor * rate)
            # The key that the block's noise has on the device, read without waiting for it.
            drawn = derive_seed(self.seed, block.noise.name, context.step) / 2**63
            block.is_dropped = block.granularity == "batch" and drawn < self._factor * rate

    def see(self, batch: Batch) -> None:
        """Tell the blocks which rows the next forward has."""
        for block in self.blocks:
            block.row_ids = batch.get("row_ids")

    def metrics(self) -> Mapping[str, float]:
        return {"mean_rate": self._factor * sum(self.rates) / len(self.rates)}


class ExitRule(StepRule):
    """Writes what early exits and the output count in a step, so that all of it adds up to 1.

    Args:
        arounds: Of all blocks but the last, in order.
        exits: What they share.
        ledger: Gets the share of the output.
        weight: Of the whole beside other terms of the loss.
        scale: How much early exits count.
        curriculum: See `is_exit`.
        rotation: See `is_exit`.
    """

    name = "early_exit"

    def __init__(
        self,
        arounds: Sequence[EarlyExit],
        exits: Exits,
        ledger: Ledger,
        *,
        weight: float,
        scale: float,
        curriculum: Curriculum,
        rotation: int,
    ) -> None:
        self.arounds, self.exits, self.ledger, self.weight = arounds, exits, ledger, weight
        self.scale, self.curriculum, self.rotation = scale, curriculum, rotation
        ledger.shares_output = True

    def check(self) -> None:
        self.exits.check()

    def begin_step(self, context: StepContext) -> None:
        *early, last = exit_weights(
            len(self.arounds) + 1,
            context.step,
            context.num_steps,
            scale=self.scale,
            curriculum=self.curriculum,
            rotation=self.rotation,
        )
        total = sum(early)
        for around, weight in zip(self.arounds, early, strict=True):
            around.is_on = weight > 0
            around.share.fill_(weight / total if total else 0.0)
        self.exits.account.factor.fill_(self.weight * total)
        self.ledger.output_factor.fill_(last)

    def see(self, batch: Batch) -> None:
        """Tell the exits the labels of the next forward."""
        self.exits.labels = batch["labels"]
