"""A model folder as it is meant to be run: its weights, and what passes do at inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanmill.core.probes import Probe
from leanmill.core.registry import parse_pass
from leanmill.models.pretrained import load_frozen
from leanmill.trainer.passes.run import inference_of


@dataclass(frozen=True, kw_only=True)
class Inference:
    """A model that is ready to run."""

    model: Any
    """Causal LM, in eval mode, frozen; `generate` works as transformers' own."""
    probes: Sequence[Probe]
    """What counts what passes do, for an evaluation."""


def load_for_inference(folder: Path, *, dtype: torch.dtype | None = None) -> Inference:
    """Load a Hugging Face folder, one that `leanmill compress` wrote with what its passes do beyond weights.

    Args:
        folder: Local.
        dtype: Of the weights; None keeps the stored one.

    Raises:
        ConfigError: It is no model folder, or its `leanmill.json` is damaged.
    """
    model: Any = load_frozen(str(folder), dtype=dtype)
    probes: list[Probe] = []
    for entry in inference_of(folder):
        layers = {int(layer): found for layer, found in entry["layers"].items()}
        probes += parse_pass(entry["pass"]).at_inference(model, layers)
    return Inference(model=model, probes=probes)
