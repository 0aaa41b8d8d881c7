"""What a model's layers become at each level, solved once and kept on disk."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from leanmill.checkpoint.storage import write_tensors
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.levels import Dense, Drop, SearchConfig
from leanmill.core.passes import LayerPassConfig
from leanmill.parallel.collectives import barrier, broadcast_object
from leanmill.trainer.passes.foresight import check_pass
from leanmill.trainer.passes.statistics import Watch, check_reached, watched
from leanmill.trainer.passes.stream import Block, BlockStream


log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Unit:
    """Layers that share a level."""

    name: str
    layers: tuple[str, ...]
    numel: int
    """Weights of them all."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path of this process's own that becomes `path` at the end: another search may write or read it too."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def units_of(config: SearchConfig, shapes: Shapes, prefixes: Sequence[str]) -> list[Unit]:
    """Return the units of a model in its order.

    Args:
        config: The search.
        shapes: (out, in) of every linear layer in a block, by its full name, in the model's order.
        prefixes: Of the blocks' names, with the dot.

    Raises:
        ConfigError: A pattern takes nothing, a layer does not fit a level, or `drop` would leave layers of a part.
    """
    taken = set(shapes)
    for level in config.aimed_levels:
        taken &= check_pass(level, shapes)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        part = prefix + name.removeprefix(prefix).partition(".")[0]
        groups.setdefault(part if config.unit == "part" else name, []).append(name)
    found = []
    for name, layers in groups.items():
        chosen = tuple(layer for layer in layers if layer in taken)
        if chosen and len(chosen) < len(layers) and isinstance(config.sorted_levels[0], Drop):
            left = next(layer for layer in layers if layer not in taken)
            raise ConfigError(
                f"levels: drop takes away {name} whole, and targets less exclude leave {left} in it; change them, or "
                f"remove drop"
            )
        if chosen:
            found.append(Unit(name, chosen, sum(math.prod(shapes[layer]) for layer in chosen)))
    return found


class LevelStore:
    """The weights of every layer at every level that a pass makes, in files of one block and one level each.

    `dense` and `drop` need none. A block is solved on what the dense blocks before it make of the calibration rows, as
    in the authors' code, so that a layer's levels do not depend on the others'.

    Args:
        folder: Theirs alone; its name says what they depend on.
        levels: From the smallest to the largest.
    """

    def __init__(self, folder: Path, levels: Sequence[LayerPassConfig]) -> None:
        self.folder, self.levels = folder, levels
        self.errors: dict[str, list[float]] = {}
        """||(W' - W) X||^2 / ||W X||^2 of each layer at each level."""

    def read(self, level: int, block: int, layer: str) -> Tensor:
        """Return the weight of a layer of a block at a level that a pass makes, in the dtype the model stores."""
        with safe_open(self._file(level, block), framework="pt") as opened:
            found: Tensor = opened.get_tensor(layer)
        return found

    def build(self, stream: BlockStream, layers: Sequence[str], *, writes: bool) -> None:
        """Solve what is not there yet, block by block; all ranks call this.

        Args:
            stream: The dense model's blocks.
            layers: To take.
            writes: Whether this rank writes; the others find the files on the same disk.

        Raises:
            RunError: A layer cannot be solved.
        """
        if writes:
            self.folder.mkdir(parents=True, exist_ok=True)
        if not all(broadcast_object(self._document(index).is_file()) for index in range(len(stream))):
            for block in stream.blocks():
                if not broadcast_object(self._document(block.index).is_file()):
                    log.info("levels: block %d of %d", block.index + 1, len(stream))
                    self._solve(block, stream, layers, writes=writes)
                stream.advance(block)
            barrier()
        for index in range(len(stream)):
            self.errors |= json.loads(self._document(index).read_text(encoding="utf-8"))

    def _document(self, block: int) -> Path:
        """Written last: a block with it is whole."""
        return self.folder / f"block-{block:04d}.json"

    def _file(self, level: int, block: int) -> Path:
        return self.folder / f"block-{block:04d}-level-{level}.safetensors"

    @torch.no_grad()
    def _solve(self, block: Block, stream: BlockStream, layers: Sequence[str], *, writes: bool) -> None:
        here = {name: layer for name, layer in stream.linears(block.index).items() if name in layers}
        weights: list[dict[str, Tensor]] = [{} for _ in self.levels]
        errors: dict[str, list[float]] = {}
        if here:
            with watched(here, with_gram=True) as watches:
                for _ in stream.run(block):
                    pass
            check_reached(here, watches)
            for watch in watches:
                self._solve_together(watch, stream, weights, errors)
        if not writes:
            return
        dtypes = stream.source.dtypes(f"{name}.weight" for name in here)
        for level, found in enumerate(weights):
            if found:
                stored = {name: value.to(dtypes[f"{name}.weight"]).contiguous() for name, value in found.items()}
                with whole_file(self._file(level, block.index)) as path:
                    write_tensors(path, stored)
        with whole_file(self._document(block.index)) as path:
            path.write_text(json.dumps(errors), encoding="utf-8")

    def _solve_together(
        self, watch: Watch, stream: BlockStream, weights: list[dict[str, Tensor]], errors: dict[str, list[float]]
    ) -> None:
        """Solve the layers that share their inputs at every level."""
        statistics = watch.total()
        gram = statistics.gram
        assert gram is not None
        tiny = torch.finfo(torch.float32).tiny
        energies = {name: max(tiny, gram.energy(stream.weight(name))) for name in watch.names}
        for name in watch.names:
            errors[name] = [0.0] * len(self.levels)
        for index, level in enumerate(self.levels):
            if isinstance(level, Dense | Drop):
                for name in watch.names:
                    errors[name][index] = float(isinstance(level, Drop))
                continue  # nothing to keep
            solver = level.solver()
            # A solver may use the matrix up.
            own = replace(statistics, gram=copy.deepcopy(gram) if solver.needs_gram else None)
            solve = solver.prepare(own)
            for name in watch.names:
                weight = solve(stream.weight(name)).weight
                if not bool(torch.isfinite(weight).all()):
                    kind = str(level.type)  # type: ignore[attr-defined]
                    raise RunError(f"{name}: {kind} gave non-finite weights; look at the calibration data")
                weights[index][name] = weight
                errors[name][index] = gram.energy(weight - stream.weight(name)) / energies[name]
