"""What the papers claim of their methods, as orders of held-out losses that a small model can be asked about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train, or to compress what was trained dense with the same seed."""

    techniques: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] | None = None
    """For `leanmill compress`; None trains."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Variants, best first."""

    says: str
    source: str
    variants: Mapping[str, Variant]


def _low_bit(bits: int) -> dict[str, Variant]:
    both = {"weight_bits": bits, "activation_bits": bits}
    return {
        f"quest W{bits}A{bits}": Variant(techniques=[{"type": "quest", **both}]),
        f"lsq W{bits}A{bits}": Variant(techniques=[{"type": "lsq", **both}]),
        f"straight-through W{bits}A{bits}": Variant(techniques=[{"type": "int_quant", **both}]),
    }


def _one_shot(name: str) -> Variant:
    return Variant(passes=[{"type": name, "num_kept": 2, "group_size": 4}])


_RIGL = {"type": "rigl", "density": 0.1, "update_every_steps": 20}

CLAIMS: dict[str, Claim] = {
    "low_bit_w4a4": Claim(
        says="QuEST trains to a lower loss than LSQ, and LSQ than plain straight-through, at 4 bits",
        source="Panferov et al. 2025, arXiv:2502.05003",
        variants=_low_bit(4),
    ),
    "low_bit_w2a2": Claim(
        says="the same at 2 bits",
        source="Panferov et al. 2025, arXiv:2502.05003",
        variants=_low_bit(2),
    ),
    "one_shot_2_4": Claim(
        says="pruned to 2:4 in one shot, SparseGPT loses less than Wanda, and Wanda less than magnitude",
        source="Frantar and Alistarh 2023, arXiv:2301.00774; Sun et al. 2023, arXiv:2306.11695",
        variants={name: _one_shot(name) for name in ("sparsegpt", "wanda", "magnitude")},
    ),
    "dynamic_sparsity_90": Claim(
        says="at 90 % zeros, masks that move (RigL) end below the same masks at rest",
        source="Evci et al. 2020, arXiv:1911.11134",
        variants={
            "rigl": Variant(techniques=[_RIGL]),
            "static": Variant(techniques=[{**_RIGL, "drop_fraction": 0.0}]),
        },
    ),
}
