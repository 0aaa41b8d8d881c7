"""One pass over windows of blocks, whose linear layers are trained together on what the blocks compute."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leanmill.core.errors import RunError
from leanmill.core.passes import WindowLayer, WindowPassConfig
from leanmill.parallel.collectives import sum_over_ranks
from leanmill.trainer.passes.folder import TargetFolder
from leanmill.trainer.passes.foresight import check_pass
from leanmill.trainer.passes.layer_pass import LayerReport, report_of, with_solved
from leanmill.trainer.passes.stream import Block, BlockStream


log = logging.getLogger(__name__)
_LAST_RATE = 0.1
"""Share of the learning rate that a window ends with."""


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A block in memory, and what stands for the weights that are trained, by their layer's full name."""

    block: Block
    layers: Mapping[str, WindowLayer]

    def weights(self) -> dict[str, Tensor]:
        """Return them by their name in the block."""
        return {
            f"{name.removeprefix(self.block.prefix)}.weight": layer.trained() for name, layer in self.layers.items()
        }


class WindowPass:
    """Trains layers window by window. Ranks take the same steps, on the mean of their gradients.

    Blocks of the window are in memory as they were, with the fp32 weights of their taken layers. Of what is kept for
    backward one block's is at a time; the others' comes again.

    Args:
        config: The pass.
        stream: The blocks.
        writer: Where they go; None on ranks that write nothing.
        seed: The recipe's.
    """

    def __init__(
        self, config: WindowPassConfig, stream: BlockStream, writer: TargetFolder | None, *, seed: int
    ) -> None:
        self.config, self.stream, self.writer, self.seed = config, stream, writer, seed
        self.technique, self.solver = str(config.type), config.solver(seed)  # type: ignore[attr-defined]
        self.targets = check_pass(config, stream.shapes)
        self.dense = list(stream.hidden)
        """What enters the window's first block in the model as it was, a batch each."""

    def run(self) -> list[LayerReport]:
        """Return what became of each layer."""
        reports: list[LayerReport] = []
        held: dict[int, _Trained] = {}
        for first, last, begun in windows(len(self.stream), self.config.window_blocks, self.config.overlap_blocks):
            for index in range(first, last):
                if index not in held:
                    held[index] = self._open(index)
            before, after = self._train([held[index] for index in range(first, last)])
            log.info("%s: blocks %d to %d, loss %.4g to %.4g", self.technique, first + 1, last, before, after)
            for index in range(first, begun):
                reports += self._close(held.pop(index))
        if self.writer is not None:
            for name in self.stream.other_names:
                self.writer.write(self.stream.source.read([name]))
            self.writer.close(self.stream.source)
        return reports

    def _open(self, index: int) -> _Trained:
        block = self.stream.open(index)
        names = [name for name in self.stream.linears(index) if name in self.targets]
        weights = {name: self.stream.weight(name).to(self.stream.device) for name in names}
        return _Trained(block=block, layers={name: self.solver.layer(name, one) for name, one in weights.items()})

    def _train(self, blocks: Sequence[_Trained]) -> tuple[float, float]:
        """Train a window; return the mean loss of its first epoch and of its last."""
        layers = [layer for one in blocks for layer in one.layers.values()]
        if not layers:
            return 0.0, 0.0
        wanted = [list(self._wanted(blocks, number)) for number in range(len(self.dense))]
        sizes = self._sizes(wanted)
        optimizer = self.solver.optimizer(layers)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        num_steps = self.config.epochs * len(wanted)
        rates = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, _LAST_RATE, total_iters=num_steps)
        order = torch.Generator().manual_seed(self.seed)
        losses: list[float] = []
        for _ in range(self.config.epochs):
            total = torch.zeros((), dtype=torch.float64)
            for number in torch.randperm(len(wanted), generator=order).tolist():
                found = self._through(blocks, number).float()
                found_losses = [
                    self.solver.loss(found, one.to(found), size)
                    for one, size in zip(wanted[number], sizes, strict=True)
                ]
                loss = torch.stack(found_losses).mean()
                total += loss.detach().double().cpu()
                pull = self.solver.pull(layers, rates.last_epoch / num_steps)
                (loss if pull is None else loss + pull).backward()
                _average(parameters)
                optimizer.step()
                optimizer.zero_grad()
                rates.step()
            losses.append(self._mean(total) / len(wanted))
        return losses[0], losses[-1]

    def _sizes(self, wanted: Sequence[Sequence[Tensor]]) -> list[float]:
        """Mean of the squared norm of a token's outputs over all ranks, of each of what is wanted."""
        norms = [
            torch.cat([one.double().square().sum(-1).flatten() for one in kind]) for kind in zip(*wanted, strict=True)
        ]
        sums = [[float(norm.sum()), len(norm)] for norm in norms]
        return [float(total / count) for total, count in sum_over_ranks(torch.tensor(sums, dtype=torch.float64))]

    def _mean(self, total: Tensor) -> float:
        """Mean over ranks, looked at."""
        mean = float(sum_over_ranks(total) / sum_over_ranks(torch.ones(())))
        if not math.isfinite(mean):
            raise RunError(
                f"{self.technique}: the loss of a window is not finite; look at model and calibration data, or lower "
                f"learning rates"
            )
        return mean

    @torch.no_grad()
    def _wanted(self, blocks: Sequence[_Trained], number: int) -> Iterator[Tensor]:
        """What a batch should come to: what the blocks make of it as they were, on the CPU."""
        starts = {"same_inputs": [self.stream.hidden], "dense_inputs": [self.dense]}
        for hidden in starts.get(self.config.reconstruct, [self.stream.hidden, self.dense]):
            state = hidden[number]
            for one in blocks:
                state = self.stream.call(one.block, number, state)
            yield state.cpu()

    def _through(self, blocks: Sequence[_Trained], number: int) -> Tensor:
        state = self.stream.hidden[number]
        for one in blocks:
            state = checkpoint(self._call, one, number, state, use_reentrant=False)
        return state

    def _call(self, one: _Trained, number: int, state: Tensor) -> Tensor:
        return self.stream.call(one.block, number, state, one.weights())

    def _close(self, one: _Trained) -> list[LayerReport]:
        """Write a block, hand on what it makes now and what it made, and give its memory back."""
        block = one.block
        self.dense = list(self.stream.run(block, self.dense))
        solved = {name: layer.solved() for name, layer in one.layers.items()}
        linears = self.stream.linears(block.index)
        for name, weight in solved.items():
            self.stream.put(linears[name], weight)
        if self.writer is not None:
            weights = {f"{name}.weight": weight for name, weight in solved.items()}
            self.writer.write(with_solved(self.stream.source, block.prefix, weights))
        self.stream.advance(block)
        self.stream.close(block)
        return [report_of(name, self.technique, weight, None) for name, weight in solved.items()]


def windows(num_blocks: int, size: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """Yield the first block of each window, where it ends, and where the next begins; the last ends with the blocks."""
    first = 0
    while first + size < num_blocks:
        yield first, first + size, first + size - overlap
        first += size - overlap
    yield first, num_blocks, num_blocks


def _average(parameters: Sequence[Any]) -> None:
    """Give all ranks the mean of their gradients."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    mean = sum_over_ranks(flat) / float(sum_over_ranks(torch.ones(())))
    for parameter, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))
