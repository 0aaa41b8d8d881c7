"""What passes will make of a model, from its configuration alone: what does not fit is refused before any work."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.experts import is_stacked_experts
from leanmill.core.levels import SearchConfig
from leanmill.core.passes import (
    DecomposingPassConfig,
    ExpertPassConfig,
    LinearPassConfig,
    MergingPassConfig,
    PassConfig,
)
from leanmill.core.sites import matches
from leanmill.core.surgery import SurgeryConfig
from leanmill.models.build import build_on_meta
from leanmill.models.config import ModelConfig
from leanmill.models.mapping import mapping_of
from leanmill.trainer.passes.expert_pass import check_experts
from leanmill.trainer.passes.merging import check_others


def after_passes(
    model: ModelConfig, passes: Sequence[PassConfig], *, seed: int, vocab_size: int | None = None
) -> ModelConfig:
    """Look at passes that will run over a model one after another, and return the section that describes the result.

    Args:
        model: The model before, which is built on the meta device; no weight is read.
        passes: In the order they run.
        seed: The recipe's.
        vocab_size: Fills a missing one of `model.config`.

    Raises:
        ConfigError: A pass does not fit what the ones before it leave.
    """
    for config in passes:
        built = build_on_meta(model, vocab_size=vocab_size, device_type="cpu", packed=False)
        if isinstance(config, SurgeryConfig):
            after = config.surgeon(seed).config(built.config)
            model = model.model_copy(update={"config": mapping_of(after), "path": None, "revision": None})
        elif isinstance(config, MergingPassConfig):
            check_others(config, built.config)
        elif isinstance(config, ExpertPassConfig):
            check_experts(config, built.config)
        elif isinstance(config, LinearPassConfig | SearchConfig):
            for one in [config] if isinstance(config, LinearPassConfig) else config.aimed_levels:
                _check_meant(one, built)
                check_pass(one, dict(_linear_shapes(built)))
            if isinstance(config, DecomposingPassConfig):  # how the weights will be kept is not to be read from these
                model = model.model_copy(update={"config": mapping_of(built.config), "path": None, "revision": None})
    return model


def check_pass(config: LinearPassConfig, shapes: Mapping[str, tuple[int, int]]) -> frozenset[str]:
    """Return the names of the linear layers that a pass takes.

    Args:
        config: The pass.
        shapes: (out, in) of every linear layer in a block, by its full name.

    Raises:
        ConfigError: A pattern takes nothing, or a weight does not fit.
    """
    technique = str(config.type)  # type: ignore[attr-defined]

    def matching(field: str, patterns: Sequence[str]) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            here = {name for name in shapes if matches(pattern, name)}
            if not here:
                leaves = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in shapes}))
                raise ConfigError(
                    f"{technique}.{field} pattern {pattern!r} matches no linear layer of a block; there are {leaves}"
                )
            found |= here
        return found

    taken = set(shapes) if config.targets is None else matching("targets", config.targets)
    taken -= matching("exclude", config.exclude)
    if not taken:
        raise ConfigError(f"{technique}: targets less exclude leave no linear layer; loosen exclude")
    for name in sorted(taken):
        config.check_shape_of(name, shapes[name])
    return frozenset(taken)


def _check_meant(config: LinearPassConfig, model: nn.Module) -> None:
    """Refuse to take every linear layer where most weights are in none."""
    if config.targets is None and any(is_stacked_experts(module) for module in model.modules()):
        technique = str(config.type)  # type: ignore[attr-defined]
        raise ConfigError(
            f"{technique} takes linear layers, and this model's experts are stacked; type targets: ['self_attn.*'] for "
            f"the others, and see mc_moe for the experts"
        )


def _linear_shapes(model: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    names = {id(module): name for name, module in model.named_modules()}
    for block in decoder_blocks(model):
        for module in block.modules():
            if isinstance(module, nn.Linear):
                yield names[id(module)], (module.out_features, module.in_features)
