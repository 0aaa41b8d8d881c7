"""Outer steps that are a whole interval late, so that nobody waits for what travels (CO2, arXiv:2401.16265)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from leanmill.parallel.engine import Engine
from leanmill.parallel.low_comm.outer import Fragment, OuterSteps
from leanmill.parallel.low_comm_config import CO2
from leanmill.parallel.tensors import global_norm


_LENGTHS = "outer/lengths"


class Co2Steps(OuterSteps):
    """Workers send how far they went in an interval, and take in, and go on from, what came of the interval before.

    m = beta m + g / Lambda, cut to [-phi, phi] an element, x = x - eta m. The staleness gap penalty Lambda is computed:
    1 + |x_t - x_(t-1)| / C, how far the anchors have gone while g travelled, over the mean length C of an outer step so
    far; as Gap-Aware (arXiv:1909.10802) does an element, here of the whole model. The paper's released code takes a
    constant, and its clipping drops what it computes.

    Args:
        config: The recipe's `layout.low_comm`.
        engine: Prepared, of a worker.
    """

    config: CO2

    def __init__(self, config: CO2, engine: Engine) -> None:
        super().__init__(config, engine)
        self._lengths = torch.zeros(3, device=engine.device)
        """Of the last outer step, of all together, and how many they were."""

    def _send(self, fragment: Fragment, due_step: int) -> None:
        super()._send(fragment, due_step)
        if len(fragment.under_way) == 1:
            # Nothing comes in yet to go on from, and what was sent must not be sent again.
            self._go_on_from_anchors(fragment, 0.0)

    def _finish(self, step: int) -> None:
        # What was sent was measured from other anchors: no step counts twice.
        for fragment in self.fragments:
            self._send(fragment, step)
        for fragment in self.fragments:
            while fragment.under_way:
                self._take_in(fragment, 0.0)

    def _step(self, names: Sequence[str], gradients: list[Tensor]) -> None:
        config = self.config
        anchors, momenta = ([of[name] for name in names] for of in (self._anchors, self._momenta))
        torch._foreach_mul_(momenta, config.momentum)
        torch._foreach_div_(gradients, self._penalty().to(gradients[0]))
        torch._foreach_add_(momenta, gradients)
        if config.momentum_clip is not None:
            torch._foreach_clamp_min_(momenta, -config.momentum_clip)
            torch._foreach_clamp_max_(momenta, config.momentum_clip)
        torch._foreach_add_(anchors, momenta, alpha=-config.lr)
        length = config.lr * global_norm(list(self._laid_out(self._momenta).values()), self._lengths.device)
        self._lengths = torch.stack([length, self._lengths[1] + length, self._lengths[2] + 1])

    def _penalty(self) -> Tensor:
        """Lambda, a scalar; 1 before there was a step, or where none had a length."""
        last, total, number = self._lengths
        gap = torch.where(total > 0, last * number / total, 0.0)
        return 1 + gap if self.config.gap_penalty else torch.ones_like(gap)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "low_comm/gap_penalty": float(self._penalty())}

    def outer_state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        state = super().outer_state(names)
        return state | {_LENGTHS: self._lengths} if names is None or _LENGTHS in names else state

    def load_outer_state(self, state: Mapping[str, Tensor], step: int) -> None:
        super().load_outer_state(state, step)
        self._lengths = state.get(_LENGTHS, self._lengths)
