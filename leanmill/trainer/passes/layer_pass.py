"""One pass over the linear layers of all blocks, by what their inputs are."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.passes import InputStatistics, LayerPassConfig, LayerSolver, SeenTokens
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.trainer.passes.folder import SourceFolder, TargetFolder
from leanmill.trainer.passes.foresight import check_pass
from leanmill.trainer.passes.maps import attention_maps
from leanmill.trainer.passes.statistics import TokenCounts, Watch, check_reached, watched
from leanmill.trainer.passes.stream import Block, BlockStream


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """What one pass did to one layer."""

    name: str
    technique: str
    zero_fraction: float
    """Of the weights written."""
    output_error: float | None
    """||(W' - W) X||^2 / ||W X||^2 on the calibration inputs X, where the solver knows it; of W' in fp32."""
    kept_as: str | None = None
    """The form that holds the weight without loss, see `model.frozen_dtype`; None where nobody says."""

    def __str__(self) -> str:
        error = "" if self.output_error is None else f", output error {self.output_error:.2%}"
        kept = "" if self.kept_as is None else f", kept as {self.kept_as}"
        return f"{self.technique} {self.name}: {self.zero_fraction:.1%} zeros{error}{kept}"


class LayerPass:
    """One pass over all blocks."""

    def __init__(self, config: LayerPassConfig, stream: BlockStream, writer: TargetFolder | None) -> None:
        self.config, self.stream, self.writer = config, stream, writer
        self.technique = str(config.type)  # type: ignore[attr-defined]
        self.solver: LayerSolver = config.solver()
        self.targets = check_pass(config, stream.shapes)

    def run(self) -> list[LayerReport]:
        reports: list[LayerReport] = []
        for block in self.stream.blocks():
            log.info("%s: block %d of %d", self.technique, block.index + 1, len(self.stream))
            reports += self._solve(block)
            self._write(block)
            self.stream.advance(block)
        if self.writer is not None:
            for name in self.stream.other_names:
                self.writer.write(self.stream.source.read([name]))
            self.writer.close(self.stream.source)
        return reports

    @torch.no_grad()
    def _solve(self, block: Block) -> list[LayerReport]:
        """Solve a block's layers; its weights leave memory meanwhile, and the solved ones come back one by one."""
        layers = {name: layer for name, layer in self.stream.linears(block.index).items() if name in self.targets}
        if not self.config.reads_text:
            return [self._solve_unseen(name, layer) for name, layer in layers.items()]
        counts, weights = TokenCounts(), self._token_weights(block)
        with watched(layers, with_gram=self.solver.needs_gram, counts=counts) as watches:
            outputs = self.stream.run(block)
            for number in range(len(self.stream.hidden)):
                counts.now = weights[number] if weights else None
                next(outputs)
        check_reached(layers, watches)
        for layer in layers.values():
            self.stream.drop(layer)
        reports: dict[str, LayerReport] = {}
        # What takes the most memory to solve comes while no weight is back yet.
        watches.sort(key=lambda watch: watch.in_features)
        while watches:
            self._solve_together(watches.pop(), layers, reports)
        return [reports[name] for name in layers]

    def _solve_unseen(self, name: str, layer: nn.Linear) -> LayerReport:
        """Solve a layer whose inputs do not matter."""
        statistics = InputStatistics(num_tokens=0, square_sum=torch.zeros(layer.in_features), gram=None)
        weight = self.solver.prepare(statistics)(self.stream.weight(name)).weight
        self.stream.put(layer, weight)
        return report_of(name, self.technique, weight, None)

    def _token_weights(self, block: Block) -> list[Tensor]:
        """What the tokens of each batch count for [B, S]; nothing where they count alike. A collective."""
        source = self.config.counts_tokens_by
        if source is None:
            return []
        rows = [batch["input_ids"] for batch in self.stream.rows]
        frequencies = self._frequencies(rows)
        seen = [SeenTokens(ids=ids, frequencies=frequencies) for ids in rows]
        if source == "ids":
            return [self.config.token_weights(tokens) for tokens in seen]
        found: list[Tensor] = []
        maps: list[Tensor] = []
        with attention_maps(self.stream.model, block, maps.append) if source == "attention" else nullcontext():
            for tokens, inputs, outputs in zip(seen, self.stream.hidden, self.stream.run(block), strict=True):
                if source == "states":
                    found.append(self.config.token_weights(replace(tokens, inputs=inputs, outputs=outputs)))
                    continue
                if not maps:
                    raise RunError(
                        f"{self.technique}: {block.prefix} has no attention whose maps could be had; type tokens: equal"
                    )
                # Several where a block is several layers.
                of_layers = [self.config.token_weights(replace(tokens, maps=one)) for one in maps]
                found.append(torch.stack(of_layers).mean(0))
                maps.clear()
        return found

    def _frequencies(self, rows: Sequence[Tensor]) -> Tensor:
        size = int(self.stream.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
        return sum_over_ranks(torch.bincount(torch.cat([ids.flatten() for ids in rows]), minlength=size))

    def _solve_together(self, watch: Watch, layers: dict[str, nn.Linear], reports: dict[str, LayerReport]) -> None:
        """Solve the layers that share their inputs."""
        statistics = watch.total()
        energies = self._energies(watch, statistics)
        solve = self.solver.prepare(statistics)
        for name in watch.names:
            solution = solve(self.stream.weight(name))
            error = None if solution.squared_error is None else solution.squared_error / energies[name]
            reports[name] = report_of(name, self.technique, solution.weight, error)
            self.stream.put(layers[name], solution.weight)

    def _energies(self, watch: Watch, statistics: InputStatistics) -> dict[str, float]:
        """||W X||^2 of each layer, where the gram matrix of X is known."""
        if statistics.gram is None:
            return {}
        tiny = torch.finfo(torch.float32).tiny
        return {name: max(tiny, statistics.gram.energy(self.stream.weight(name))) for name in watch.names}

    def _write(self, block: Block) -> None:
        if self.writer is None:
            return
        layers = self.stream.linears(block.index)
        solved = {f"{name}.weight": layers[name].weight.detach() for name in layers if name in self.targets}
        self.writer.write(with_solved(self.stream.source, block.prefix, solved))


def report_of(name: str, technique: str, weight: Tensor, output_error: float | None) -> LayerReport:
    """Return what is said of a layer.

    Raises:
        RunError: Its weight is not finite.
    """
    if not all(map(math.isfinite, (float(end) for end in weight.aminmax()))):
        raise RunError(f"{name}: {technique} gave non-finite weights; look at the calibration data")
    zero_fraction = 1 - int(weight.count_nonzero()) / weight.numel()
    return LayerReport(name=name, technique=technique, zero_fraction=zero_fraction, output_error=output_error)


def with_solved(source: SourceFolder, prefix: str, solved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a block to write: solved ones in the dtype they had, the others as stored, bit for bit."""
    names = [name for name in source.keys if name.startswith(prefix)]
    tensors = source.read(name for name in names if name not in solved)
    dtypes = source.dtypes(solved)
    return tensors | {name: weight.to("cpu", dtypes[name]) for name, weight in solved.items()}
