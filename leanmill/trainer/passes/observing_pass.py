"""One pass that looks at the linear layers of each block, and leaves them as they are."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from leanmill.core.passes import ObservingPassConfig
from leanmill.trainer.passes.folder import TargetFolder
from leanmill.trainer.passes.foresight import check_pass
from leanmill.trainer.passes.statistics import check_reached, watched
from leanmill.trainer.passes.stream import Block, BlockStream


log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BlockReport:
    """What one pass found of one block."""

    index: int
    technique: str
    score: float

    def __str__(self) -> str:
        return f"{self.technique} of block {self.index}: {self.score:.4g}"


class ObservingPass:
    """Scores all blocks, one after another.

    Args:
        config: The pass.
        stream: The blocks.
        writer: Where copies of their tensors go; None on ranks that write nothing.
    """

    def __init__(self, config: ObservingPassConfig, stream: BlockStream, writer: TargetFolder | None) -> None:
        self.config, self.stream, self.writer = config, stream, writer
        self.technique = str(config.type)  # type: ignore[attr-defined]
        self.targets = check_pass(config, stream.shapes)

    def run(self) -> list[BlockReport]:
        """Return the score of each block that has a target."""
        reports = []
        for block in self.stream.blocks():
            log.info("%s: block %d of %d", self.technique, block.index + 1, len(self.stream))
            reports.append(self._see(block))
            if self.writer is not None:
                names = [name for name in self.stream.source.keys if name.startswith(block.prefix)]
                self.writer.write(self.stream.source.read(names))
            self.stream.advance(block)
        if self.writer is not None:
            for name in self.stream.other_names:
                self.writer.write(self.stream.source.read([name]))
            self.writer.close(self.stream.source)
        return reports

    @torch.no_grad()
    def _see(self, block: Block) -> BlockReport:
        layers = {name: layer for name, layer in self.stream.linears(block.index).items() if name in self.targets}
        score = 0.0
        if layers:
            with watched(layers, with_gram=False) as watches:
                for _ in self.stream.run(block):
                    pass
            check_reached(layers, watches)
            sums = {name: total.square_sum for watch in watches for total in [watch.total()] for name in watch.names}
            score = self.config.score([(self.stream.weight(name), sums[name]) for name in layers])
        return BlockReport(index=block.index, technique=self.technique, score=score)
