"""What a drawn mask is a function of, beside weight and logits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Draw:
    """One draw of all masks of a weight.

    With pi the logits of a group's C ways to keep `num_kept` of `group_size`, in lexicographic order, and g Gumbel
    noise: softmax((scale pi + g) / temperature).
    """

    num_kept: int
    group_size: int
    scale: float
    temperature: float
    key: int
    """Of the noise, of [0, 2^63), as in `leanmill.core.noise`."""
    first: int
    """Where the first logit stands in the whole tensor."""
