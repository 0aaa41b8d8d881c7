"""Agreement between the ranks that save together, over a process group of their own.

Saves run in the background while training goes on. Two streams of collectives on one gloo group
meet each other's messages and abort the process, hence the separate group.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from leanmill.core.errors import RunError
from leanmill.core.quiet import ignore_warning
from leanmill.parallel.launch import patient_group


_TIMEOUT = timedelta(hours=2)  # a rank may wait for the slowest rank's disk


class SaveGroup:
    """All ranks of the run, or this process alone where no process group exists.

    Construction is collective.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.group = patient_group(_TIMEOUT) if several else None
        self.rank = dist.get_rank() if several else 0
        self.size = dist.get_world_size() if several else 1

    def on_first_rank(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 while the others wait.

        Raises:
            RunError: On every rank, when the action raised.
        """
        message = ""
        if self.rank == 0:
            try:
                action()
            except (OSError, RunError, ValueError, RuntimeError) as error:
                message = describe(error)
        message = self.broadcast(message)
        if message:
            raise RunError(message)

    def broadcast(self, text: str) -> str:
        """Return rank 0's `text` on every rank."""
        return self.gather(text if self.rank == 0 else "")[0]

    def gather(self, text: str) -> list[str]:
        """Return every rank's `text`, by rank, on every rank."""
        if self.group is None:
            return [text]
        data = text.encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self.group)
        longest = max(1, *(int(length) for length in lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        pieces = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(pieces, padded, group=self.group)
        return [bytes(p[: int(n)].tolist()).decode() for p, n in zip(pieces, lengths, strict=True)]

    def total(self, count: int) -> int:
        """Return the sum of `count` over the ranks."""
        if self.group is None:
            return count
        value = torch.tensor([count])
        dist.all_reduce(value, group=self.group)
        return int(value)


def describe(error: BaseException) -> str:
    """One line about an error, with the remedy where it is a full disk."""
    import errno

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}"
    return " ".join(str(error).split()) or type(error).__name__


def message_of(error: BaseException) -> str:
    """One line about what went wrong on the first rank that failed."""
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        return describe(cause) + (f" (rank {rank})" if rank else "")
    return describe(error)


def one_process_is_meant() -> None:
    """Silence torch where one process saves or loads alone, which is what is asked for here."""
    ignore_warning("torch.distributed is disabled, unavailable or uninitialized", UserWarning)
