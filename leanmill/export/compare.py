"""Loading an export back and comparing two models by their logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanmill.core.encoders import first_position
from leanmill.core.errors import RunError
from leanmill.core.technique import ModelTask
from leanmill.models.pretrained import quiet_transformers
from leanmill.models.tasks import auto_class
from leanmill.trainer.losses import model_inputs


TOLERANCE = 1e-4
"""Largest logit difference allowed between a model and its reloaded export, as a share of the
largest logit (at least of 1): weights are equal in fp32, the order of additions may not be."""


def reload(folder: Path, task: ModelTask = "causal_lm") -> Any:
    """Load an exported folder the way anyone would."""
    with quiet_transformers():
        return auto_class(task).from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32).eval()


def sample_logits(model: Any) -> dict[str, Tensor]:
    """Return the logits of fixed rows, by kind: `random`, one document a row, and `packed`, several.

    Values are fp32 [rows, tokens, vocabulary]; the model is in eval mode.
    """
    config = model.config
    length = min(48, (getattr(config, "max_position_embeddings", None) or 48) - first_position(model))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    whole = torch.arange(length).expand(2, -1)
    cut = length // 3
    restarting = torch.cat([torch.arange(cut), torch.arange(length - cut)]).expand(2, -1)
    batches = {
        kind: {"input_ids": rows, "position_ids": places}
        for kind, places in (("random", whole), ("packed", restarting))
    }
    with torch.no_grad():
        return {kind: _output(model(**model_inputs(model, batch))) for kind, batch in batches.items()}


def _output(found: Any) -> Tensor:
    """Return logits, or of a model without a head its hidden states."""
    output: Tensor = found.logits if "logits" in found else found.last_hidden_state
    return output.float()


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest absolute difference of any logit."""
    return max((found[kind] - expected[kind]).abs().max().item() for kind in expected)


def allowed(expected: dict[str, Tensor]) -> float:
    """Return the largest difference that still counts as the same model."""
    return TOLERANCE * max(1.0, *(logits.abs().max().item() for logits in expected.values()))


def check_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> float:
    """Return the largest difference.

    Raises:
        RunError: It is not allowed, or not a number.
    """
    difference = largest_difference(found, expected)
    if not difference <= allowed(expected):  # not <=, so that NaN fails
        raise RunError(
            f"{what} computes other logits than the trained model (largest difference {difference:.2e}, allowed "
            f"{allowed(expected):.0e}); nothing was written. Report this with the recipe"
        )
    return difference
