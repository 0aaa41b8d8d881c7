"""Where the ranks of a run meet before the process group exists, and say who is missing."""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from leanmill.core.errors import ConfigError, RunError


log = logging.getLogger(__name__)

NOTICE_SECONDS = 5.0
"""Silence before the first notice; the notices after it come at twice the interval each."""
_MAX_POLL_SECONDS = 0.5
_CONNECT_SECONDS = 2.0
_NUM_NAMED = 8
"""Missing ranks that a notice names."""


class Meeting:
    """The key-value store of all ranks at `MASTER_ADDR:MASTER_PORT`.

    torch's own rendezvous would block in silence until its time-out, and then print a C++ stack.
    """

    def __init__(self, *, rank: int, world_size: int, local_rank: int, timeout_seconds: float) -> None:
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.timeout_seconds = timeout_seconds
        self.host, self.port = _address(world_size)
        self._started = time.monotonic()
        self._next_notice = NOTICE_SECONDS

    def join(self) -> dist.Store:
        """Return the store once every rank is there.

        Raises:
            ConfigError: The port is taken.
            RunError: A rank, or the host of the store, was not there in time, or the host went away.
        """
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"leanmill/attempt_{attempt}", self._connect())
        try:
            self._wait_for_all(store)
        except dist.DistNetworkError as error:
            raise RunError(
                f"the host of {self.host}:{self.port} went away while ranks gathered there; see rank 0's error"
            ) from error
        return store

    def _wait_for_all(self, store: dist.Store) -> None:
        store.set(_key(self.rank), "here")
        if store.add("arrived", 1) == self.world_size:
            store.set("complete", "yes")
        while not store.check(["complete"]):
            if self._is_notice_due() and not self._lower_rank_here(store):
                log.warning("%s", self._missing(store))
            if self._elapsed() > self.timeout_seconds:
                raise RunError(self._missing(store) + self._remedy())
            self._pause()

    def _connect(self) -> dist.Store:
        # torchrun's agent keeps the store unless it was told not to share it; then rank 0 does.
        if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return self._serve()
        # torch's client prints a stack on each failed attempt, so it connects once that will work.
        while not _listens(self.host, self.port):
            if self._is_notice_due():
                log.warning("waiting for rank 0 at %s:%d: nothing answers there", self.host, self.port)
            if self._elapsed() > self.timeout_seconds:
                raise RunError(f"nothing answered at {self.host}:{self.port}" + self._remedy())
            self._pause()
        return self._store(is_master=False)

    def _serve(self) -> dist.Store:
        try:
            return self._store(is_master=True)
        except dist.DistNetworkError as error:
            raise ConfigError(
                f"rank 0 cannot listen at {self.host}:{self.port} ({str(error).splitlines()[0]}); set MASTER_ADDR to "
                f"this machine and MASTER_PORT to a free port, or start with torchrun --standalone"
            ) from error

    def _store(self, *, is_master: bool) -> dist.Store:
        timeout = timedelta(seconds=self.timeout_seconds)
        return dist.TCPStore(
            self.host, self.port, self.world_size, is_master, timeout, wait_for_workers=False, multi_tenant=True
        )

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _pause(self) -> None:
        # Often at first, when everybody is about to come; rarely later, for the sake of a store of thousands.
        time.sleep(min(_MAX_POLL_SECONDS, 0.01 + self._elapsed() / 10))

    def _is_notice_due(self) -> bool:
        if self._elapsed() < self._next_notice:
            return False
        self._next_notice *= 2
        return True

    def _lower_rank_here(self, store: dist.Store) -> bool:
        """Whether a lower rank of this machine is there to give the notice."""
        return any(store.check([_key(rank)]) for rank in range(self.rank - self.local_rank, self.rank))

    def _missing(self, store: dist.Store) -> str:
        missing = [rank for rank in range(self.world_size) if not store.check([_key(rank)])]
        names = ", ".join(map(str, missing[:_NUM_NAMED])) + (", ..." if len(missing) > _NUM_NAMED else "")
        return (
            f"waiting for {len(missing)} of {self.world_size} ranks at {self.host}:{self.port} "
            f"(missing: {names or 'none, one more moment'})"
        )

    def _remedy(self) -> str:
        return (
            f", given up after {self.timeout_seconds:g} s; look at the log of the machine that is missing, check that "
            f"it can reach this address and port, start every machine with the same address, or allow more time "
            f"with cluster.init_timeout_seconds"
        )


def _key(rank: int) -> str:
    return f"rank/{rank}"


def _address(world_size: int) -> tuple[str, int]:
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        raise ConfigError(
            f"WORLD_SIZE={world_size} ranks need an address to meet, and MASTER_ADDR={host!r}, MASTER_PORT={port!r} "
            f"is none; start with torchrun, or set both"
        )
    return host, int(port)


def _listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
