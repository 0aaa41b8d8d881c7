"""Run a C function over the rows of a tensor on the threads that torch uses.

The idle threads of an OpenMP runtime go on spinning for milliseconds, so work on any others
competes with them for the cores: a second runtime inside the C code would, and so would plain
threads. Where torch runs on GNU's OpenMP (its Linux wheels do, and load it for all to see), its
team is asked to do the work. Elsewhere plain threads share it; foreign calls release the
interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


GRAIN_ELEMENTS = 32_768
"""Fewer elements a thread are not worth waking one: about 10 microseconds of work."""

_IMPORTED_BY = os.getpid()
_Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def parallel_for(function: Callable[[int, int], object], num_rows: int, row_elements: int) -> None:
    """Call `function(first, last)` so that the calls cover rows 0 to `num_rows` once.

    Args:
        function: Works on rows `first` to `last - 1`; calls run at the same time.
        num_rows: Independent rows.
        row_elements: Elements a row, to decide on the number of calls.
    """
    num_threads = num_threads_for(num_rows, row_elements)
    if num_threads <= 1:
        function(0, num_rows)
        return
    bounds = [num_rows * part // num_threads for part in range(num_threads + 1)]

    def run(part: int) -> None:
        function(bounds[part], bounds[part + 1])

    team = _torch_team()
    # A forked child has its parent's teams and executors without their threads.
    if team is not None and os.getpid() == _IMPORTED_BY:
        _run_on_team(team, run, num_threads)
    else:
        _run_on_executor(run, num_threads)


class _Team(ctypes.Structure):
    """As in team.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("parallel", "number", "size"))


def team_for_c() -> ctypes.c_void_p | None:
    """Return the `thread_team` that a C function may hand to `on_team` (team.h), or None where there is none.

    Such a function wakes the team without the interpreter, which saves some 20 microseconds a call.
    """
    return _described_team() if os.getpid() == _IMPORTED_BY else None


def num_threads_for(num_rows: int, row_elements: int) -> int:
    """Return the threads that `parallel_for` would share these rows among."""
    return min(torch.get_num_threads(), num_rows, max(1, num_rows * row_elements // GRAIN_ELEMENTS))


@functools.cache
def _described_team() -> ctypes.c_void_p | None:
    team = _torch_team()
    if team is None:
        return None
    functions = (team.GOMP_parallel, team.omp_get_thread_num, team.omp_get_num_threads)
    description = _Team(*(ctypes.cast(function, ctypes.c_void_p).value for function in functions))
    _KEPT.append(description)
    return ctypes.cast(ctypes.pointer(description), ctypes.c_void_p)


_KEPT: list[_Team] = []
"""What C has the address of."""


def _run_on_team(team: ctypes.CDLL, run: Callable[[int], None], num_parts: int) -> None:
    errors: list[BaseException] = []

    def member(_: None) -> None:
        try:
            # The runtime may give fewer threads than asked for.
            for part in range(team.omp_get_thread_num(), num_parts, team.omp_get_num_threads()):
                run(part)
        except BaseException as error:  # noqa: BLE001 (C could not pass it on)
            errors.append(error)

    team.GOMP_parallel(_Member(member), None, num_parts, 0)
    if errors:
        raise errors[0]


def _run_on_executor(run: Callable[[int], None], num_parts: int) -> None:
    pool = _pool(os.getpid(), num_parts - 1)
    others = [pool.submit(run, part) for part in range(1, num_parts)]
    run(0)
    for other in others:
        other.result()


@functools.cache
def _torch_team() -> ctypes.CDLL | None:
    """Return what the process offers of GNU's OpenMP runtime, or None."""
    process = ctypes.CDLL(None)
    if not torch.backends.openmp.is_available() or not hasattr(process, "GOMP_parallel"):
        return None
    process.GOMP_parallel.argtypes = [_Member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    process.GOMP_parallel.restype = None
    return process


@functools.cache
def _pool(process: int, num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num_threads, thread_name_prefix="leanmill-kernels")
