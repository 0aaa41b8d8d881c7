"""Names of divergences. Imports no torch."""

from __future__ import annotations

from typing import Literal


Kind = Literal[
    "forward_kl",
    "reverse_kl",
    "js",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "mse",
    "cakld",
    "deviation_aware",
]
"""Of single tokens."""
