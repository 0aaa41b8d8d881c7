"""When skipping non-finite steps has stopped being an exception: the one rule of `train.non_finite: skip`."""

from __future__ import annotations

from collections import deque

from leanmill.core.errors import RunError


WINDOW_STEPS = 100
"""Steps over which more skipped than taken ones end a run."""


class SkipWatch:
    """Follows how many steps were skipped; every rank sees the same numbers.

    Args:
        step: Steps done when watching begins.
        num_skipped: Of these, the skipped ones.
    """

    def __init__(self, step: int, num_skipped: int) -> None:
        self._seen = deque([(step, num_skipped)])

    def is_stuck(self, step: int, num_skipped: int) -> bool:
        """Whether more than half of the last `WINDOW_STEPS` steps, or of a few more, were skipped.

        Args:
            step: Steps done; asked at each log record, so windows end there.
            num_skipped: Of these, the skipped ones.
        """
        self._seen.append((step, num_skipped))
        while len(self._seen) > 1 and self._seen[1][0] <= step - WINDOW_STEPS:
            self._seen.popleft()
        first_step, first_skipped = self._seen[0]
        num_steps = step - first_step
        return num_steps >= WINDOW_STEPS and 2 * (num_skipped - first_skipped) > num_steps


def stuck(step: int, num_skipped: int, what: str) -> RunError:
    """Return the error of a run that has mostly skipped; its checkpoint is written by then."""
    return RunError(
        f"most {what} were skipped as non-finite or as spikes, {num_skipped} of {step} steps in all, so the model has "
        f"hardly trained; the checkpoint of step {step} is saved. Lower optimizer.lr, lengthen schedule.warmup_steps "
        f"or look at the data, and start again in a new run_dir or from a checkpoint before the trouble"
    )
