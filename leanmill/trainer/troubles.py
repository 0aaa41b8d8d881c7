"""Steps whose update was kept back, told apart on the device and read when it costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanmill.core.errors import RunError
from leanmill.trainer.rewind import RewindError


Kind = Literal["non-finite loss or gradient", "spike of the loss or the gradient's norm"]
NON_FINITE: Kind = "non-finite loss or gradient"
SPIKE: Kind = "spike of the loss or the gradient's norm"
Action = Literal["stop", "skip", "rewind"]
_NONE = torch.iinfo(torch.int64).max


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A step that ends what was going on."""

    step: int
    """From 1."""
    kind: Kind
    action: Literal["stop", "rewind"]


class Troubles:
    """The first step of each kind since they were last read.

    Args:
        actions: What a step of each kind asks for; of those that are skipped nothing is kept.
        device: Where losses are.
    """

    def __init__(self, actions: dict[Kind, Action], device: torch.device) -> None:
        self.actions: dict[Kind, Literal["stop", "rewind"]] = {
            kind: action for kind, action in actions.items() if action != "skip"
        }
        self._first = {kind: torch.full((), _NONE, dtype=torch.int64, device=device) for kind in self.actions}

    def see(self, step: int, flags: dict[Kind, Tensor]) -> None:
        """Note a step.

        Args:
            step: From 1.
            flags: Whether it is of a kind, bool scalars on the device.
        """
        for kind, first in self._first.items():
            first.copy_(torch.where(flags[kind] & (first == _NONE), step, first))

    def read(self) -> Trouble | None:
        """Return the earliest and forget all; waits for the device."""
        found: list[tuple[int, Kind]] = []
        for kind, first in self._first.items():
            if (step := int(first)) != _NONE:
                found.append((step, kind))
            first.fill_(_NONE)
        if not found:
            return None
        step, kind = min(found)
        return Trouble(step=step, kind=kind, action=self.actions[kind])


def error_of(trouble: Trouble, where: str, position_rows: int) -> RunError:
    """Return what a trouble ends the loop with.

    Args:
        trouble: The step.
        where: Where it came from, a sentence's end; empty where that is not known.
        position_rows: Rows read by all ranks until now.
    """
    what = f"{trouble.kind} in step {trouble.step}{where}"
    if trouble.action == "rewind":
        return RewindError(trouble.step, what, position_rows)
    key = "train.non_finite" if trouble.kind == NON_FINITE else "train.spike.action"
    return RunError(
        f"{what}; its update was not applied. Lower optimizer.lr, look at the data, or set {key}=skip to drop such "
        f"steps, or {key}=rewind to go on from the checkpoint before with other rows"
    )
