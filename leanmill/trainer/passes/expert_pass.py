"""One expert pass over all blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.experts import is_stacked_experts
from leanmill.core.passes import ExpertLayer, ExpertPassConfig, ExpertSolution
from leanmill.core.stored_experts import PROJECTIONS, STORED_EXPERTS
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.trainer.passes.folder import TargetFolder
from leanmill.trainer.passes.stream import Block, BlockStream


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExpertReport:
    """What one pass did to the experts of one layer."""

    name: str
    """Of the decoder block."""
    technique: str
    text: str
    layer: int
    """Index of the block."""
    inference: Mapping[str, float]
    """See `ExpertSolution`."""

    def __str__(self) -> str:
        return f"{self.technique} {self.name}: {self.text}"


@dataclass
class _Seen:
    """What went into the experts of a layer on this rank."""

    hidden: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


def check_experts(config: ExpertPassConfig, model_config: Any) -> None:
    """Refuse a model that an expert pass does not fit.

    Raises:
        ConfigError: It has no experts that can be read one by one, or what the pass's solver says.
    """
    technique = str(config.type)  # type: ignore[attr-defined]
    if model_config.model_type not in STORED_EXPERTS:
        raise ConfigError(
            f"{technique} needs a mixture of experts that it can read one by one, and {model_config.model_type!r} is "
            f"none; give one of {', '.join(STORED_EXPERTS)}"
        )
    config.solver().check(model_config)


class ExpertPass:
    """Solves the experts of one block after another, each on what the solved ones before it make of the text.

    Args:
        config: The pass.
        stream: The blocks.
        writer: Where they go; None on ranks that write nothing.
    """

    def __init__(self, config: ExpertPassConfig, stream: BlockStream, writer: TargetFolder | None) -> None:
        self.technique, self.solver = str(config.type), config.solver()  # type: ignore[attr-defined]
        self.stream, self.writer = stream, writer
        self.names = STORED_EXPERTS[stream.model.config.model_type]

    def run(self) -> list[ExpertReport]:
        """Return what became of each sparse layer."""
        reports = []
        for block in self.stream.blocks():
            log.info("%s: block %d of %d", self.technique, block.index + 1, len(self.stream))
            experts = next((module for module in block.module.modules() if is_stacked_experts(module)), None)
            solution = None if experts is None else self._solve(block, experts)
            self._write(block, solution)
            if solution is not None:
                name = block.prefix.rstrip(".")
                reports.append(
                    ExpertReport(
                        name=name,
                        technique=self.technique,
                        text=solution.text,
                        layer=block.index,
                        inference=solution.inference,
                    )
                )
            self.stream.advance(block)
        if self.writer is not None:
            for name in self.stream.other_names:
                self.writer.write(self.stream.source.read([name]))
            self.writer.close(self.stream.source)
        return reports

    @torch.no_grad()
    def _solve(self, block: Block, experts: Any) -> ExpertSolution:
        with _watched(experts) as seen:
            for _ in self.stream.run(block):
                pass
        layer = ExpertLayer(
            index=block.index,
            num_experts=experts.num_experts,
            read=lambda expert: {part: self._stored(block, expert, part).float() for part in PROJECTIONS},
            activation=experts.act_fn,
            hidden=torch.cat(seen.hidden),
            chosen=torch.cat(seen.chosen),
            weights=torch.cat(seen.weights),
            total=sum_over_ranks,
        )
        solution = self.solver.solve(layer)
        for expert, weights in solution.weights.items():
            if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
                raise RunError(
                    f"{block.prefix}: {self.technique} gave expert {expert} non-finite weights; look at the "
                    f"calibration data"
                )
            experts.gate_up_proj[expert].copy_(torch.cat([weights["gate"], weights["up"]]))
            experts.down_proj[expert].copy_(weights["down"])
        return solution

    def _stored(self, block: Block, expert: int, part: Any) -> Tensor:
        name = f"{block.prefix}{self.names.expert(expert, part)}"
        return self.stream.source.read([name])[name]

    def _write(self, block: Block, solution: ExpertSolution | None) -> None:
        """Write the block: experts as they were solved in the dtype they had, everything else bit for bit."""
        if self.writer is None:
            return
        stored = self.stream.source
        names = [name for name in stored.keys if name.startswith(block.prefix)]
        tensors = stored.read(name for name in names if solution is None or not self._is_of_experts(block, name))
        for expert, weights in solution.weights.items() if solution is not None else ():
            for part in PROJECTIONS:
                name = f"{block.prefix}{self.names.expert(expert, part)}"
                tensors[name] = weights[part].to(stored.dtypes([name])[name]).contiguous()
        self.writer.write(tensors)

    def _is_of_experts(self, block: Block, name: str) -> bool:
        return self.names.is_of_experts(name.removeprefix(block.prefix))


@contextmanager
def _watched(experts: nn.Module) -> Iterator[_Seen]:
    """Keep what the experts are called with while the block runs."""
    seen = _Seen()

    def hook(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
        hidden, chosen, weights = inputs
        seen.hidden.append(hidden.detach().cpu())
        seen.chosen.append(chosen.detach().cpu())
        seen.weights.append(weights.detach().float().cpu())

    handle = experts.register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
