"""One pass over the linear layers of all blocks, by how much the loss minds their weights."""

from __future__ import annotations

import logging

from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.core.passes import SensitivePassConfig
from leanmill.parallel.launch import Ranks
from leanmill.trainer.passes.folder import TargetFolder
from leanmill.trainer.passes.foresight import check_pass
from leanmill.trainer.passes.gradients import WeightGradients
from leanmill.trainer.passes.layer_pass import LayerReport, report_of, with_solved
from leanmill.trainer.passes.stream import BlockStream


log = logging.getLogger(__name__)


class SensitivePass:
    """Solves layers one by one; every rank does the same, on sensitivities over all rows, or the gradients of all.

    Args:
        config: The pass.
        stream: The blocks.
        writer: Where they go; None on ranks that write nothing.
        ranks: Which process this is.
    """

    def __init__(
        self, config: SensitivePassConfig, stream: BlockStream, writer: TargetFolder | None, ranks: Ranks
    ) -> None:
        self.technique, self.solver = str(config.type), config.solver()  # type: ignore[attr-defined]
        self.reads_each_row = config.reads_each_row
        self.stream, self.writer, self.ranks = stream, writer, ranks
        self.targets = check_pass(config, stream.shapes)

    def run(self) -> list[LayerReport]:
        """Return what became of each layer."""
        log.info("%s: gradients of %d layers", self.technique, len(self.targets))
        gradients = WeightGradients(self.stream.config, self.stream.rows, self.ranks)
        sensitivities: dict[str, Tensor] = {}
        if not self.reads_each_row:
            sensitivities = gradients.mean_squares(self.targets)
        reports: list[LayerReport] = []
        for index in range(len(self.stream)):
            if self.reads_each_row:
                sensitivities = gradients.of_each_row(self.targets.intersection(self.stream.linears(index)))
            solved: dict[str, Tensor] = {}
            for name in self.stream.linears(index):
                if name in self.targets:
                    weight = self._solve(name, sensitivities.pop(name))
                    reports.append(report_of(name, self.technique, weight, None))
                    solved[f"{name}.weight"] = weight
            if self.writer is not None:
                self.writer.write(with_solved(self.stream.source, self.stream.prefix(index), solved))
        if self.writer is not None:
            for name in self.stream.other_names:
                self.writer.write(self.stream.source.read([name]))
            self.writer.close(self.stream.source)
        return reports

    def _solve(self, name: str, sensitivity: Tensor) -> Tensor:
        if not bool(sensitivity.isfinite().all()):
            raise RunError(f"{name}: its gradients are not finite on the calibration rows; look at model and data")
        return self.solver.solve(self.stream.weight(name), sensitivity).weight
