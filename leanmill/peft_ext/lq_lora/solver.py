"""Taking the layers of a model apart, each into as many bits as an integer program gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from leanmill.core.compact import Compact, Kind
from leanmill.core.errors import ConfigError
from leanmill.core.facets import LowRank
from leanmill.core.noise import derive_seed
from leanmill.core.passes import Decomposition
from leanmill.core.program import cheapest_choices
from leanmill.peft_ext.lq_lora.decompose import Parts, decompose, rounded


_KINDS: dict[int, Kind] = {2: "nf2", 3: "nf3", 4: "nf4", 8: "int8"}


class LqSolver:
    """See `LqLora` for the arguments."""

    def __init__(
        self, *, rank: int, bits: Sequence[int], average_bits: float | None, iterations: int, is_randomised: bool
    ) -> None:
        self.rank, self.bits, self.average_bits = rank, sorted(bits), average_bits
        self.iterations, self.is_randomised = iterations, is_randomised
        self.num_choices = len(self.bits)

    def check(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        if self.average_bits is None:
            return
        taken = self._taken(list(shapes.values()))
        least = taken[:, 0].sum() / sum(out * num_in for out, num_in in shapes.values())
        if self.average_bits < least:
            raise ConfigError(
                f"lq_lora.average_bits={self.average_bits:g} is below {least:.3f}, what {self.bits[0]} bits a weight "
                f"come to with their scales; set average_bits to that or more"
            )

    def cost(self, name: str, weight: Tensor, sensitivity: Tensor | None, choice: int) -> float:
        return self._parts(name, weight, sensitivity, choice, torch.float32).error

    def choose(self, costs: Tensor, shapes: Sequence[tuple[int, int]]) -> list[int]:
        if self.average_bits is None:
            return [0] * len(shapes)
        num_weights = sum(out * num_in for out, num_in in shapes)
        found = cheapest_choices(costs.numpy(), [(self._taken(shapes) / num_weights, 0.0, self.average_bits)])
        assert found is not None  # `check` has seen that there is one
        return found

    def solve(
        self, name: str, weight: Tensor, sensitivity: Tensor | None, choice: int, dtype: torch.dtype
    ) -> Decomposition:
        parts = self._parts(name, weight, sensitivity, choice, dtype)
        factors = LowRank(a=parts.a, b=parts.b, scaling=1.0)
        return Decomposition(weight=parts.kept, factors=factors, kept_as=_KINDS[self.bits[choice]])

    def _parts(self, name: str, weight: Tensor, sensitivity: Tensor | None, choice: int, dtype: torch.dtype) -> Parts:
        # By the layer's name, so that costs and solutions are of the same draws.
        drawn = torch.Generator().manual_seed(derive_seed(0, "lq_lora", name))
        return decompose(
            weight,
            self.rank,
            partial(rounded, kind=_KINDS[self.bits[choice]], dtype=dtype),
            sensitivity=sensitivity,
            iterations=self.iterations,
            generator=drawn if self.is_randomised else None,
        )

    def _taken(self, shapes: Sequence[tuple[int, int]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        """Bits of each layer with each choice [layers, choices]."""

        def taken(shape: tuple[int, int], bits: int) -> float:
            stage = Compact(shape, _KINDS[bits], torch.float32, torch.device("meta"))
            return stage.bits_a_weight * shape[0] * shape[1]

        return np.array([[taken(shape, bits) for bits in self.bits] for shape in shapes])
