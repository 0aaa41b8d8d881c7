"""Passes from recipe to model folder: what `leanmill compress` calls."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.folders import new_folder
from leanmill.core.levels import SearchConfig
from leanmill.core.passes import (
    ExpertPassConfig,
    InputStatistics,
    LayerPassConfig,
    LayerSolver,
    PassConfig,
    SurgeryConfig,
)
from leanmill.data.build import build_tokenizer, build_train_data
from leanmill.models.pretrained import local_folder, pretrained_config
from leanmill.parallel.collectives import barrier, broadcast_object
from leanmill.parallel.launch import Ranks, finish, init_processes
from leanmill.parallel.precision import resolve_precision
from leanmill.recipe.compress import CalibratedRecipe, CompressRecipe
from leanmill.recipe.sections import ClusterConfig
from leanmill.trainer.passes.calibrated import Calibrated
from leanmill.trainer.passes.expert_pass import ExpertPass, ExpertReport
from leanmill.trainer.passes.folder import SourceFolder, TargetFolder
from leanmill.trainer.passes.foresight import after_passes, check_pass
from leanmill.trainer.passes.gradients import expert_gradients
from leanmill.trainer.passes.memory import return_large_blocks
from leanmill.trainer.passes.search import UnitReport, search_levels
from leanmill.trainer.passes.statistics import Watch, check_reached, watched
from leanmill.trainer.passes.stream import Block, BlockStream
from leanmill.trainer.passes.surgery import ModelReport, operate


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

    def __str__(self) -> str:
        error = "" if self.output_error is None else f", output error {self.output_error:.2%}"
        return f"{self.technique} {self.name}: {self.zero_fraction:.1%} zeros{error}"


PassReport = LayerReport | ExpertReport | ModelReport | UnitReport
SUMMARY = "leanmill.json"
"""What was done to a model, in its folder."""


def compress(recipe: CompressRecipe, out: Path) -> list[PassReport]:
    """Run the recipe's passes over its model, one after another, and write the result to `out`.

    Under torchrun every rank calls this; each runs its share of the calibration rows.

    Raises:
        ConfigError: The model, the data or a pass does not fit.
        RunError: A layer cannot be solved, or the disk refuses.
    """
    return_large_blocks()
    ranks = init_processes(recipe.device, ClusterConfig())
    try:
        return compress_in(ranks, recipe, out)
    finally:
        finish()


def compress_in(ranks: Ranks, recipe: CompressRecipe, out: Path) -> list[PassReport]:
    """Do what `compress` does in processes that were joined before and are kept; see there."""
    pretrained_config(recipe.model)  # says what is wrong with the path in one line
    folder = local_folder(str(recipe.model.path), recipe.model.revision)
    after_passes(recipe.model, recipe.passes, seed=recipe.seed)
    batches = calibration_rows(recipe, folder, ranks) if any(config.reads_text for config in recipe.passes) else []
    dtype = torch.bfloat16 if resolve_precision(recipe.precision, ranks.device.type) == "bf16" else torch.float32
    reports: list[PassReport] = []
    layers: set[str] = set()
    inference = [] if any(config.changes_architecture for config in recipe.passes) else inference_of(folder)
    with new_folder(out) if ranks.rank == 0 else nullcontext() as made:
        place = Path(broadcast_object(str(made)))
        for number, config in enumerate(recipe.passes, 1):
            target = place if number == len(recipe.passes) else place / f".pass-{number}"
            if ranks.rank == 0:
                target.mkdir(exist_ok=True)
            model = recipe.model.model_copy(update={"path": str(folder), "revision": None})
            source = SourceFolder(folder)
            writer = TargetFolder(target) if ranks.rank == 0 else None
            if isinstance(config, SurgeryConfig):
                gradients = expert_gradients(model, batches, ranks) if config.reads_gradients else {}
                calibrated = Calibrated(source, model, batches, device=ranks.device, dtype=dtype)
                reports += [
                    operate(
                        config,
                        source,
                        model,
                        writer,
                        seed=recipe.seed,
                        gradients=gradients,
                        calibrated=calibrated,
                    )
                ]
            elif isinstance(config, SearchConfig):
                stream = BlockStream(source, model, batches, device=ranks.device, dtype=dtype)
                work_dir = Path(config.work_dir or f"{out}.search")
                searched = search_levels(config, recipe, model, stream, batches, writer, ranks=ranks, work_dir=work_dir)
                reports += searched.reports
                layers |= searched.layers
            else:
                stream = BlockStream(source, model, batches, device=ranks.device, dtype=dtype)
                assert isinstance(config, LayerPassConfig | ExpertPassConfig)
                kind = ExpertPass if isinstance(config, ExpertPassConfig) else _Pass
                found = kind(config, stream, writer).run()  # type: ignore[arg-type]
                inference += _inference(config, found)
                reports += found
            barrier()
            folder = target
        if ranks.rank == 0:
            for intermediate in place.glob(".pass-*"):
                shutil.rmtree(intermediate)
            summary = {
                "passes": [config.model_dump(mode="json") for config in recipe.passes],
                "reports": [str(report) for report in reports if not isinstance(report, LayerReport)],
                "layers": sorted(layers | {report.name for report in reports if isinstance(report, LayerReport)}),
                "inference": inference,
            }
            (place / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return reports


def inference_of(folder: Path) -> list[dict[str, Any]]:
    """Return what passes that wrote a folder do at inference: each `pass`, its configuration, and `layers`.

    Raises:
        ConfigError: Its summary is damaged.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("inference", [])
    except (ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); write the folder again with leanmill compress, or delete the file if its "
            f"weights are to be taken as a plain model"
        ) from error
    return found


def _inference(config: PassConfig, reports: Sequence[PassReport]) -> list[dict[str, Any]]:
    layers = {
        str(report.layer): dict(report.inference)
        for report in reports
        if isinstance(report, ExpertReport) and report.inference
    }
    return [{"pass": config.model_dump(mode="json"), "layers": layers}] if layers else []


class _Pass:
    """One pass over all blocks."""

    def __init__(self, config: LayerPassConfig, stream: BlockStream, writer: TargetFolder | None) -> None:
        self.config, self.stream, self.writer = config, stream, writer
        self.technique = str(config.type)  # type: ignore[attr-defined]
        self.solver: LayerSolver = config.solver()
        shapes = {
            name: (layer.out_features, layer.in_features)
            for index in range(len(stream))
            for name, layer in stream.linears(index).items()
        }
        self.targets = check_pass(config, shapes)

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
        with watched(layers, with_gram=self.solver.needs_gram) as watches:
            for _ in self.stream.run(block):
                pass
        check_reached(layers, watches)
        for layer in layers.values():
            self.stream.drop(layer)
        reports: dict[str, LayerReport] = {}
        # What takes the most memory to solve comes while no weight is back yet.
        watches.sort(key=lambda watch: watch.in_features)
        while watches:
            self._solve_together(watches.pop(), layers, reports)
        return [reports[name] for name in layers]

    def _solve_together(self, watch: Watch, layers: dict[str, nn.Linear], reports: dict[str, LayerReport]) -> None:
        """Solve the layers that share their inputs."""
        statistics = watch.total()
        energies = self._energies(watch, statistics)
        solve = self.solver.prepare(statistics)
        for name in watch.names:
            solution = solve(self.stream.weight(name))
            weight = solution.weight
            if not all(map(math.isfinite, (float(end) for end in weight.aminmax()))):
                raise RunError(f"{name}: {self.technique} gave non-finite weights; look at the calibration data")
            reports[name] = LayerReport(
                name=name,
                technique=self.technique,
                zero_fraction=1 - int(weight.count_nonzero()) / weight.numel(),
                output_error=None if solution.squared_error is None else solution.squared_error / energies[name],
            )
            self.stream.put(layers[name], weight)

    def _energies(self, watch: Watch, statistics: InputStatistics) -> dict[str, float]:
        """||W X||^2 of each layer, where the gram matrix of X is known."""
        if statistics.gram is None:
            return {}
        tiny = torch.finfo(torch.float32).tiny
        return {name: max(tiny, statistics.gram.energy(self.stream.weight(name))) for name in watch.names}

    def _write(self, block: Block) -> None:
        """Write the block's tensors; what no pass touched as it was stored, bit for bit."""
        if self.writer is None:
            return
        layers = self.stream.linears(block.index)
        solved = {f"{name}.weight": layers[name].weight.detach() for name in layers if name in self.targets}
        names = [name for name in self.stream.source.keys if name.startswith(block.prefix)]
        tensors = self.stream.source.read(name for name in names if name not in solved)
        dtypes = self.stream.source.dtypes(solved)
        tensors |= {name: weight.to("cpu", dtypes[name]) for name, weight in solved.items()}
        self.writer.write(tensors)


def calibration_rows(recipe: CalibratedRecipe, folder: Path, ranks: Ranks) -> list[dict[str, Tensor]]:
    """Return this rank's batches of calibration rows, `input_ids` and `position_ids` [B, S].

    Raises:
        ConfigError: They do not divide over the ranks.
    """
    data = recipe.data
    if data.tokenizer.path is None:
        data = data.model_copy(update={"tokenizer": data.tokenizer.model_copy(update={"path": str(folder)})})
    num_rows, rows_per_batch = recipe.calibration.num_rows, recipe.calibration.rows_per_batch
    if num_rows % ranks.world_size:
        raise ConfigError(
            f"calibration.num_rows={num_rows} does not divide over {ranks.world_size} ranks; set it to "
            f"{-(-num_rows // ranks.world_size) * ranks.world_size}"
        )
    train = build_train_data(data, build_tokenizer(data, seed=recipe.seed), seed=recipe.seed)
    rows = train.next_rows(num_rows, rank=ranks.rank, world_size=ranks.world_size)
    chunks = {name: rows[name].split(rows_per_batch) for name in ("input_ids", "position_ids")}
    return [dict(zip(chunks, parts, strict=True)) for parts in zip(*chunks.values(), strict=True)]
