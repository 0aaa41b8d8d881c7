"""One pass that takes a delta of low rank out of the linear layers of all blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.facets import LowRank
from leanmill.core.folders import ADAPTER
from leanmill.core.passes import DecomposingPassConfig
from leanmill.models.stored_adapter import write_adapter
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.parallel.launch import Ranks
from leanmill.trainer.passes.folder import TargetFolder
from leanmill.trainer.passes.foresight import check_pass
from leanmill.trainer.passes.gradients import WeightGradients
from leanmill.trainer.passes.layer_pass import LayerReport, report_of, with_solved
from leanmill.trainer.passes.stream import BlockStream


log = logging.getLogger(__name__)


class DecomposingPass:
    """Chooses how each layer is taken apart by what that costs, then does it; ranks share the costs out.

    Args:
        config: The pass.
        stream: The blocks.
        writer: Where they go, and the adapter beside them; None on ranks that write nothing.
        ranks: Which process this is.
    """

    def __init__(
        self, config: DecomposingPassConfig, stream: BlockStream, writer: TargetFolder | None, ranks: Ranks
    ) -> None:
        self.technique, self.solver = str(config.type), config.solver()  # type: ignore[attr-defined]
        self.reads_text, self.stream, self.writer, self.ranks = config.reads_text, stream, writer, ranks
        targets = check_pass(config, stream.shapes)
        self.shapes = {name: shape for name, shape in stream.shapes.items() if name in targets}
        self.solver.check(self.shapes)

    def run(self) -> list[LayerReport]:
        """Return what became of each layer."""
        sensitivities: Mapping[str, Tensor] = {}
        if self.reads_text:
            log.info("%s: gradients of %d layers", self.technique, len(self.shapes))
            gradients = WeightGradients(self.stream.config, self.stream.rows, self.ranks)
            sensitivities = gradients.mean_squares(self.shapes)
            if broken := [name for name, value in sensitivities.items() if not bool(value.isfinite().all())]:
                raise RunError(
                    f"{broken[0]}: its gradients are not finite on the calibration rows; look at model and data"
                )
        choices = self._choices(sensitivities)
        reports: list[LayerReport] = []
        factors: dict[str, LowRank] = {}
        for index in range(len(self.stream)):
            log.info("%s: block %d of %d", self.technique, index + 1, len(self.stream))
            solved = dict(self._solved(index, sensitivities, choices, reports, factors))
            if self.writer is not None:
                self.writer.write(with_solved(self.stream.source, self.stream.prefix(index), solved))
        if self.writer is not None:
            for name in self.stream.other_names:
                self.writer.write(self.stream.source.read([name]))
            self.writer.close(self.stream.source)
            write_adapter(self.writer.path / ADAPTER, factors)
        return reports

    def _choices(self, sensitivities: Mapping[str, Tensor]) -> dict[str, int]:
        """The way of each layer."""
        costs = torch.zeros(len(self.shapes), self.solver.num_choices, dtype=torch.float64)
        for row, name in enumerate(self.shapes):
            if self.solver.num_choices > 1 and row % self.ranks.world_size == self.ranks.rank:
                log.info("%s: what the choices cost, layer %d of %d", self.technique, row + 1, len(self.shapes))
                weight = self.stream.weight(name)
                for choice in range(self.solver.num_choices):
                    costs[row, choice] = self.solver.cost(name, weight, sensitivities.get(name), choice)
        chosen = self.solver.choose(sum_over_ranks(costs), list(self.shapes.values()))
        return dict(zip(self.shapes, chosen, strict=True))

    def _solved(
        self,
        index: int,
        sensitivities: Mapping[str, Tensor],
        choices: Mapping[str, int],
        reports: list[LayerReport],
        factors: dict[str, LowRank],
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what stays of the weights of a block; say so in `reports`, and add the rest to `factors`."""
        names = [name for name in self.stream.linears(index) if name in self.shapes]
        dtypes = self.stream.source.dtypes(f"{name}.weight" for name in names)
        for name in names:
            found = self.solver.solve(
                name, self.stream.weight(name), sensitivities.get(name), choices[name], dtypes[f"{name}.weight"]
            )
            report = report_of(name, self.technique, found.weight, None)
            reports.append(replace(report, kept_as=found.kept_as))
            factors[name] = found.factors
            yield f"{name}.weight", found.weight
