"""A model folder as it is meant to be run: its weights, and what passes do at inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.probes import Probe
from leanmill.core.registry import parse_pass
from leanmill.models.offloading import Held, is_offloaded
from leanmill.models.pretrained import load_frozen
from leanmill.trainer.passes.run import inference_of
from leanmill.trainer.train_module import TrainModule


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A model that is ready to run."""

    model: Any
    """Causal LM, in eval mode, frozen; `generate` works as transformers' own."""
    probes: Sequence[Probe]
    """What counts what passes do, for an evaluation."""


def load_for_inference(folder: Path, *, dtype: torch.dtype | None = None, held: Held | None = None) -> Inference:
    """Load a Hugging Face folder, one that `leanmill compress` wrote with what its passes do beyond weights.

    Args:
        folder: Local.
        dtype: Of the weights; None keeps the stored one.
        held: How much of the weights is held, and where; None holds all on the CPU.

    Raises:
        ConfigError: It is no model folder, its `leanmill.json` is damaged, or `held` is given and its passes change
            what layers compute.
    """
    entries = inference_of(folder)
    if entries and held is not None:
        raise ConfigError(
            f"{folder}: the pass {entries[0]['pass']['type']} changes what layers compute, which needs their weights "
            f"in memory; leave out how many GiB of them to hold"
        )
    model: Any = load_frozen(str(folder), dtype=dtype, held=held)
    probes: list[Probe] = []
    for entry in entries:
        layers = {int(layer): found for layer, found in entry["layers"].items()}
        probes += parse_pass(entry["pass"]).at_inference(model, layers)
    return Inference(model=model, probes=probes)


def to_be_scored(module: nn.Module, device: torch.device) -> nn.Module:
    """Return a train module on a device; one whose weights accelerate moves where it is, its head called as it is."""
    if not (isinstance(module, TrainModule) and is_offloaded(module.model)):
        return module.to(device)
    module.use_logits()  # the other paths read the head's weight, which is there during its call only
    return module
