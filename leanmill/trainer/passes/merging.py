"""A pass that merges other models into one, a tensor at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.passes import MergingPassConfig
from leanmill.models.config import ModelConfig
from leanmill.models.pretrained import local_folder, pretrained_config
from leanmill.recipe.on_this_machine import local_model
from leanmill.recipe.phases import OF_PHASE
from leanmill.trainer.passes.folder import SourceFolder, TargetFolder
from leanmill.trainer.passes.surgery import ModelReport


def merge(config: MergingPassConfig, source: SourceFolder, writer: TargetFolder | None) -> ModelReport:
    """Write the model with what is taken of the others; ranks that write nothing do nothing.

    Args:
        config: The pass; every model of it is there.
        source: The model.
        writer: Where the result goes; None on ranks that write nothing.

    Raises:
        ConfigError: Another model has other tensors.
        RunError: Some of its tensors hold what is no number.
    """
    technique = str(config.type)  # type: ignore[attr-defined]
    if writer is None:
        return ModelReport(technique=technique, text="written by the first rank")
    others = {path: _opened(technique, path, source) for path in config.models}
    num_taken, num_weights = dict.fromkeys(others, 0), 0
    for name in sorted(source.keys):
        tensor = source.read([name])[name]
        if tensor.is_floating_point():
            num_weights += tensor.numel()
            for path, other in others.items():
                found = _read(technique, path, other, name, tensor)
                taken = config.taken(tensor.float(), found.float())
                tensor = found.to(tensor.dtype).where(taken, tensor)
                num_taken[path] += int(taken.sum())
        writer.write({name: tensor})
    writer.close(source)
    shares = ", ".join(f"{num / num_weights:.1%} of the weights of {path}" for path, num in num_taken.items())
    return ModelReport(technique=technique, text=f"took {shares}")


def check_others(config: MergingPassConfig, mine: Any) -> None:
    """Refuse models that are not there or of another family; those of the hub and of phases to come are not looked at.

    Args:
        config: The pass.
        mine: transformers configuration of the model that they are merged into.

    Raises:
        ConfigError: See above.
    """
    technique = str(config.type)  # type: ignore[attr-defined]
    for path in config.models:
        if path.startswith(OF_PHASE):
            continue
        here = local_model(ModelConfig(path=path))
        if here is None and path.startswith(("/", ".", "~")):
            raise ConfigError(f"{technique}: {path} is no model folder; correct the path, or export the run first")
        if here is None:
            continue
        theirs = pretrained_config(here)
        if theirs.model_type != mine.model_type:
            raise ConfigError(
                f"{technique}: {path} is a {theirs.model_type} and the model a {mine.model_type}; merge models that "
                f"were trained from one start"
            )


def _opened(technique: str, path: str, source: SourceFolder) -> SourceFolder:
    if path.startswith(OF_PHASE):
        raise ConfigError(f"{technique}: {path} names a phase, and this recipe has none; give a folder or a hub name")
    other = SourceFolder(local_folder(path, None), source.transposed)
    if differing := sorted(source.keys ^ other.keys):
        raise ConfigError(
            f"{technique}: {path} and the model differ in {len(differing)} tensors ({differing[0]}); merge models that "
            f"were trained from one start"
        )
    return other


def _read(technique: str, path: str, other: SourceFolder, name: str, mine: Tensor) -> Tensor:
    found = other.read([name])[name]
    if found.shape != mine.shape:
        raise ConfigError(
            f"{technique}: {name} of {path} is {list(found.shape)} and the model's {list(mine.shape)}; merge models "
            f"that were trained from one start"
        )
    if not (found.isfinite().all() and mine.isfinite().all()):
        raise RunError(
            f"{technique}: {name} of {path}, or of the model, holds what is not finite; give another checkpoint"
        )
    return found
