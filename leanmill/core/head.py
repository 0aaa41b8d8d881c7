"""What a model family does to its logits after the output head, as its configuration tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


_EXTRAS = ("logit_scale", "logits_scaling", "final_logit_softcapping", "output_multiplier_scale")
_KNOWN_FAMILIES = (
    "cohere",
    "cohere2",
    "gemma2",
    "gemma3_text",
    "granite",
    "granitemoe",
    "nanochat",
    "vaultgemma",
)
"""Families whose logits are exactly `HeadForm` of the head's output, which takes the body's last hidden
state; checked against transformers' own models by tests."""


@dataclass(frozen=True)
class HeadForm:
    """Logits are softcap tanh(scale x / softcap) of the head's output x, or scale x without a cap."""

    scale: float = 1.0
    softcap: float | None = None


def head_extras(config: Any) -> list[str]:
    """Return the settings by which a transformers configuration changes logits after the head."""
    return [name for name in _EXTRAS if getattr(config, name, None) not in (None, 1, 1.0)]


def known_head_form(config: Any) -> HeadForm | None:
    """Return what follows the head, for the families where that is known to be all; else None."""
    if getattr(config, "model_type", None) not in _KNOWN_FAMILIES:
        return None
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return HeadForm(scale, getattr(config, "final_logit_softcapping", None))
