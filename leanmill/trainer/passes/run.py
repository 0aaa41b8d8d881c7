"""Passes from recipe to model folder: what `leanmill compress` calls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.folders import ADAPTER, SUMMARY, new_folder
from leanmill.core.levels import SearchConfig
from leanmill.core.passes import (
    DecomposingPassConfig,
    ExpertPassConfig,
    LayerPassConfig,
    MergingPassConfig,
    ObservingPassConfig,
    PassConfig,
    SensitivePassConfig,
    WindowPassConfig,
)
from leanmill.core.surgery import SurgeryConfig
from leanmill.core.transposed import transposed_weights
from leanmill.data.build import build_tokenizer, build_train_data
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import local_folder, pretrained_config
from leanmill.models.stored_adapter import has_adapter
from leanmill.parallel.collectives import barrier, broadcast_object
from leanmill.parallel.launch import Ranks, finish, init_processes
from leanmill.parallel.precision import resolve_precision
from leanmill.recipe.compress import CalibratedRecipe, CompressRecipe
from leanmill.recipe.sections import ClusterConfig
from leanmill.trainer.passes.calibrated import Calibrated
from leanmill.trainer.passes.decomposing_pass import DecomposingPass
from leanmill.trainer.passes.expert_pass import ExpertPass, ExpertReport
from leanmill.trainer.passes.folder import SourceFolder, TargetFolder
from leanmill.trainer.passes.foresight import after_passes
from leanmill.trainer.passes.gradients import expert_gradients
from leanmill.trainer.passes.layer_pass import LayerPass, LayerReport
from leanmill.trainer.passes.memory import return_large_blocks
from leanmill.trainer.passes.merging import merge
from leanmill.trainer.passes.observing_pass import BlockReport, ObservingPass
from leanmill.trainer.passes.search import UnitReport, search_levels
from leanmill.trainer.passes.sensitive_pass import SensitivePass
from leanmill.trainer.passes.stream import BlockStream
from leanmill.trainer.passes.surgery import ModelReport, operate
from leanmill.trainer.passes.window_pass import WindowPass
from leanmill.trainer.run_lock import exclusive


PassReport = BlockReport | LayerReport | ExpertReport | ModelReport | UnitReport


def compress(recipe: CompressRecipe, out: Path) -> list[PassReport]:
    """Run the recipe's passes over its model, one after another, and write the result to `out`.

    Under torchrun every rank calls this; each runs its share of the calibration rows.

    Raises:
        ConfigError: The model, the data or a pass does not fit, or another command writes `out` now.
        RunError: A layer cannot be solved, or the disk refuses.
    """
    return_large_blocks()
    ranks = init_processes(recipe.device, ClusterConfig())
    try:
        with ExitStack() as held:
            try:
                held.enter_context(exclusive(out.parent / f".{out.name}.lock", ranks.rank))
            except ConfigError as error:
                raise ConfigError(f"{out} is being written by another command: {error}") from error
            return compress_in(ranks, recipe, out)
    finally:
        finish()


def compress_in(ranks: Ranks, recipe: CompressRecipe, out: Path) -> list[PassReport]:
    """Do what `compress` does in processes that were joined before and are kept; see there."""
    pretrained_config(recipe.model)  # says what is wrong with the path in one line
    folder = local_folder(str(recipe.model.path), recipe.model.revision)
    if has_adapter(folder):
        raise ConfigError(
            f"{folder} has a part of its weights in {ADAPTER}/, which passes would leave out; train with lora "
            f"{{init: stored}} and export first, or give the model that was taken apart"
        )
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
            turned = transposed_weights(build_on_meta(model, packed=False))
            source = SourceFolder(folder, turned)
            writer = TargetFolder(target, turned) if ranks.rank == 0 else None
            if isinstance(config, SurgeryConfig):
                reports += [_operate(config, recipe, source, model, batches, writer, ranks=ranks, dtype=dtype)]
            elif isinstance(config, MergingPassConfig):
                reports += [merge(config, source, writer)]
            elif isinstance(config, SearchConfig):
                stream = BlockStream(source, model, batches, device=ranks.device, dtype=dtype)
                work_dir = Path(config.work_dir or f"{out}.search")
                searched = search_levels(config, recipe, model, stream, batches, writer, ranks=ranks, work_dir=work_dir)
                reports += searched.reports
                layers |= searched.layers
            else:
                if isinstance(config, LayerPassConfig) and config.counts_tokens_by == "attention":
                    model = model.model_copy(update={"attention": "eager"})  # the one that has maps
                stream = BlockStream(source, model, batches, device=ranks.device, dtype=dtype)
                found = _run(config, stream, writer, ranks, seed=recipe.seed)
                inference += _inference(config, found)
                reports += found
            barrier()
            folder = target
        if ranks.rank == 0:
            for intermediate in place.glob(".pass-*"):
                shutil.rmtree(intermediate)
            summary = {
                "passes": [config.model_dump(mode="json") for config in recipe.passes],
                "reports": [str(report) for report in reports if not isinstance(report, BlockReport | LayerReport)],
                "layers": sorted(layers | {report.name for report in reports if isinstance(report, LayerReport)}),
                "inference": inference,
                "kept_as": {
                    report.name: report.kept_as
                    for report in reports
                    if isinstance(report, LayerReport) and report.kept_as is not None
                },
                "block_scores": _block_scores(reports),
            }
            (place / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return reports


def _operate(
    config: SurgeryConfig,
    recipe: CompressRecipe,
    source: SourceFolder,
    model: ModelConfig,
    batches: Sequence[dict[str, Tensor]],
    writer: TargetFolder | None,
    *,
    ranks: Ranks,
    dtype: torch.dtype,
) -> ModelReport:
    gradients = expert_gradients(model, batches, ranks) if config.reads_gradients else {}
    calibrated = Calibrated(source, model, batches, device=ranks.device, dtype=dtype)
    return operate(config, source, model, writer, seed=recipe.seed, gradients=gradients, calibrated=calibrated)


def _run(
    config: PassConfig, stream: BlockStream, writer: TargetFolder | None, ranks: Ranks, *, seed: int
) -> Sequence[PassReport]:
    if isinstance(config, SensitivePassConfig):
        return SensitivePass(config, stream, writer, ranks).run()
    if isinstance(config, ObservingPassConfig):
        return ObservingPass(config, stream, writer).run()
    if isinstance(config, DecomposingPassConfig):
        return DecomposingPass(config, stream, writer, ranks).run()
    if isinstance(config, WindowPassConfig):
        return WindowPass(config, stream, writer, seed=seed).run()
    if isinstance(config, ExpertPassConfig):
        return ExpertPass(config, stream, writer).run()
    assert isinstance(config, LayerPassConfig)
    return LayerPass(config, stream, writer).run()


def _block_scores(reports: Sequence[PassReport]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for report in reports:
        if isinstance(report, BlockReport):
            found.setdefault(report.technique, []).append(report.score)
    return found


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
