"""How many micro-batches transformers' Trainer makes a step of: fewer where an epoch ends."""

from __future__ import annotations

from typing import Any


class Accumulation:
    """Follows the Trainer through its epochs, whose last step takes the batches that are left.

    Args:
        args: The `TrainingArguments`.
    """

    def __init__(self, args: Any) -> None:
        self.usual = int(args.gradient_accumulation_steps)
        """Micro-batches of a step that no epoch ends."""
        self._skips_data = not args.ignore_data_skip
        self._num_batches: int | None = None
        self._first_step = 0

    def begin_epoch(self, global_step: int, dataloader: Any) -> None:
        """Call at the beginning of every epoch, and where a resumed training begins one in its middle."""
        try:
            self._num_batches = len(dataloader)
        except TypeError:  # a stream ends where it ends: the Trainer makes no step of what is left then
            self._num_batches = None
            return
        num_steps = max(1, -(-self._num_batches // self.usual))
        self._first_step = global_step - (global_step % num_steps if self._skips_data else 0)

    def of_step(self, global_step: int) -> int:
        """Return the micro-batches of a step, given how many were taken before it."""
        if self._num_batches is None:
            return self.usual
        left = self._num_batches - (global_step - self._first_step) * self.usual
        return max(1, min(self.usual, left))
