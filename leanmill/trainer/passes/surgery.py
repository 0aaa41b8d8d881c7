"""A surgery from model folder to model folder, the tensors of one block at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.surgery import (
    CalibratedModel,
    ExpertGradients,
    GradientSurgeon,
    LookingSurgeon,
    StoredBlock,
    Surgeon,
    SurgeryConfig,
)
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import pretrained_config
from leanmill.trainer.passes.folder import SourceFolder, TargetFolder


_FILE_BYTES = 2**30
"""Of a file that is written, at least, unless the block ends: experts are many and small."""


@dataclass(frozen=True, kw_only=True)
class ModelReport:
    """What one pass did to the whole model."""

    technique: str
    text: str

    def __str__(self) -> str:
        return f"{self.technique}: {self.text}"


def operate(
    config: SurgeryConfig,
    source: SourceFolder,
    model: ModelConfig,
    writer: TargetFolder | None,
    *,
    seed: int,
    gradients: Mapping[int, ExpertGradients],
    calibrated: CalibratedModel,
) -> ModelReport:
    """Write what a surgery makes of a model.

    Args:
        config: The pass.
        source: The model's folder.
        model: Names that folder.
        writer: Where the result goes; None on ranks that write nothing.
        seed: The recipe's.
        gradients: Of experts, where the pass reads them.
        calibrated: The model, for passes that look at it.

    Raises:
        ConfigError: The model cannot become what was asked for.
        RunError: Calibration rows do not tell what to do, or the disk refuses.
    """
    technique = str(config.type)  # type: ignore[attr-defined]
    surgeon = config.surgeon(seed)
    built = build_on_meta(model, packed=False)
    # As it is stored: building writes the dtype it builds in.
    after = surgeon.config(pretrained_config(model))
    if config.reads_gradients:
        cast(GradientSurgeon, surgeon).see(gradients)
    if config.looks:
        after = cast(LookingSurgeon, surgeon).look(calibrated)
    if writer is not None:
        for name, config_of_it in surgeon.further():
            (writer.path / name).mkdir()
            _write_model(surgeon, built, source, TargetFolder(writer.path / name), config_of_it)
        _write_model(surgeon, built, source, writer, after)
    return ModelReport(technique=technique, text=surgeon.describe())


def _write_model(surgeon: Surgeon, built: nn.Module, source: SourceFolder, writer: TargetFolder, config: Any) -> None:
    names = {id(module): name for name, module in built.named_modules()}
    prefixes = [f"{names[id(block)]}." for block in decoder_blocks(built)]
    for index, prefix in enumerate(prefixes):
        place = surgeon.place(index)
        if place is not None:
            tensors = surgeon.block(stored_block(source, prefix, index))
            _write(writer, ((f"{prefixes[place]}{name}", tensor) for name, tensor in tensors))
    others = sorted(name for name in source.keys if not name.startswith(tuple(prefixes)))
    _write(writer, surgeon.rest(others, lambda name: source.read([name])[name]))
    writer.close(source, config=config)


def stored_block(source: SourceFolder, prefix: str, index: int) -> StoredBlock:
    """Return the tensors of a block as the folder stores them."""
    return StoredBlock(
        index=index,
        names=frozenset(name.removeprefix(prefix) for name in source.keys if name.startswith(prefix)),
        read=lambda name: source.read([f"{prefix}{name}"])[f"{prefix}{name}"],
    )


def _write(writer: TargetFolder, tensors: Iterator[tuple[str, Tensor]]) -> None:
    waiting: dict[str, Tensor] = {}
    num_bytes = 0
    for name, tensor in tensors:
        waiting[name] = tensor
        num_bytes += tensor.numel() * tensor.element_size()
        if num_bytes >= _FILE_BYTES:
            writer.write(waiting)
            waiting, num_bytes = {}, 0
    writer.write(waiting)
