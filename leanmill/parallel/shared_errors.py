"""An error that ranks share is told once. No torch is imported here: a wrong recipe never needs it.

The ranks find out through the store they met at, not through a collective: nobody knows which of
them have failed. Whatever goes wrong with the store, the error is told.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from leanmill.core.errors import RunError


if TYPE_CHECKING:
    import torch.distributed as dist


RANK_0_SECONDS = 0.5
"""How long others wait for rank 0 to have the same error."""
LINGER_SECONDS = 1.0
"""How long the teller waits for others to hear: it may be the host of the store."""
TOLD_SECONDS = 5.0
"""How long a rank with nothing to say waits for torchrun to end it."""
CAUSE_SECONDS = 2.0
"""How long a rank that lost another waits for that one to tell why."""
ANSWER_SECONDS = 10.0
"""How long a rank waits for the store in all: its machine may be the one that is lost."""
_POLL_SECONDS = 0.01
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL error")


_known_of_hang: Callable[[], str] = str
"""Says who hangs, as far as that is known; empty where it is not."""


class LostRankError(RunError):
    """Another rank ended or hangs, which this one saw as a failed collective."""


def ask_of_hangs(known: Callable[[], str]) -> None:
    """Say what knows who hangs, for the error that a collective's time-out will be."""
    global _known_of_hang  # noqa: PLW0603
    _known_of_hang = known


def lost_rank(error: BaseException) -> LostRankError | None:
    """Return what a failed collective means to a user, or None where `error` is something else."""
    if not isinstance(error, RuntimeError) or isinstance(error, RunError):
        return None
    for reason in _LOST_PEER:
        if reason in str(error):
            known = f": {told}" if (told := _known_of_hang()) else ""
            return LostRankError(
                f"another rank ended or hangs ({reason}){known}; see its own error, or its machine's log, for why, "
                f"then start again: the run continues from its newest checkpoint"
            )
    return None


_TOLD = "error/told"


class _Ranks:
    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size


_ranks: _Ranks | None = None


def use_store(store: dist.Store, rank: int, world_size: int) -> None:
    """Say where the ranks of this run can hear of each other's errors."""
    global _ranks  # noqa: PLW0603
    _ranks = _Ranks(store, rank, world_size)


def is_mine_to_tell(message: str) -> bool:
    """Whether this rank prints `message`: rank 0 where it has the same error, else the first that has.

    Call it once an error, on every rank that has one; `linger` after printing.
    """
    if _ranks is None:
        return True
    store, rank, key = _ranks.store, _ranks.rank, _key(message)
    return _answered(lambda: _is_teller(store, rank, key), otherwise=True)


def _is_teller(store: dist.Store, rank: int, key: str) -> bool:
    if rank > 0 and _comes_true(lambda: store.check([f"{key}/0"]), RANK_0_SECONDS):
        store.add(f"{key}/heard", 1)
        return False
    if rank == 0:
        store.set(f"{key}/0", "told")
    is_first = store.add(f"{key}/tellers", 1) == 1
    if not is_first:
        store.add(f"{key}/heard", 1)
    return is_first


def linger(message: str) -> None:
    """Stay until the other ranks have heard `message`, or for a moment if they have no such error."""
    if _ranks is None:
        return
    store, key, others = _ranks.store, _key(message), _ranks.world_size - 1

    def stay() -> bool:
        store.set(_TOLD, "yes")
        return _comes_true(lambda: store.add(f"{key}/heard", 0) >= others, LINGER_SECONDS)

    _answered(stay, otherwise=False)


def is_told_by_its_cause(error: BaseException) -> bool:
    """Whether `error` only follows from another rank's, which that one has told."""
    if _ranks is None or not isinstance(error, LostRankError):
        return False
    store = _ranks.store
    return _answered(lambda: _comes_true(lambda: store.check([_TOLD]), CAUSE_SECONDS), otherwise=False)


def write_error_file(message: str) -> None:
    """Give torchrun `message` for its own summary, which otherwise shows the address of a manual."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    details = {"py_callstack": message, "timestamp": str(int(time.time()))}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": message, "extraInfo": details}}, file)
    except OSError:
        return  # The message was printed; this is a copy of it.


def leave_when_told(*, cause_is_elsewhere: bool = False, seconds: float = TOLD_SECONDS) -> None:
    """Wait for the SIGTERM that torchrun sends once another rank has failed, and exit with 0 on it.

    So torchrun's summary shows the rank that told the error and no other. Returns after `seconds`
    without it, or at once where torchrun is not the parent; the caller then exits with its own code.
    The first rank of each machine does not wait: its code is how the machine's torchrun learns; but
    it does where the failure is another rank's.
    """
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if "TORCHELASTIC_RUN_ID" not in os.environ or (is_first and not cause_is_elsewhere):
        return
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    time.sleep(seconds)


def _key(message: str) -> str:
    return f"error/{hashlib.sha256(message.encode()).hexdigest()}"


def _answered(ask: Callable[[], bool], *, otherwise: bool) -> bool:
    """Return what the store answers, or `otherwise` where it does not.

    One whose machine is gone does not refuse, it is silent: a thread asks, and is left behind.
    """
    found: list[bool] = []

    def put() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(ask())

    asker = threading.Thread(target=put, name="store", daemon=True)
    asker.start()
    asker.join(ANSWER_SECONDS)
    return found[0] if found else otherwise


def _comes_true(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
