"""Run a C function over the rows of a tensor on as many threads as torch would use.

OpenMP inside the C code would bring a second runtime next to torch's, whose idle threads spin
against ours. Foreign calls release the interpreter's lock, so plain threads share the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


GRAIN_ELEMENTS = 32_768
"""Fewer elements a thread are not worth waking one: about 10 microseconds of work."""

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def parallel_for(function: Callable[[int, int], object], num_rows: int, row_elements: int) -> None:
    """Call `function(first, last)` so that the calls cover rows 0 to `num_rows` once.

    Args:
        function: Works on rows `first` to `last - 1`; calls run at the same time.
        num_rows: Independent rows.
        row_elements: Elements a row, to decide on the number of calls.
    """
    num_threads = min(torch.get_num_threads(), num_rows, max(1, num_rows * row_elements // GRAIN_ELEMENTS))
    if num_threads <= 1:
        function(0, num_rows)
        return
    bounds = [num_rows * part // num_threads for part in range(num_threads + 1)]
    pool = _pool(num_threads - 1)
    others = [pool.submit(function, *bounds[part : part + 2]) for part in range(1, num_threads)]
    function(*bounds[:2])
    for other in others:
        other.result()


def _pool(num_threads: int) -> ThreadPoolExecutor:
    # A forked child has its parent's executors without their threads.
    key = (os.getpid(), num_threads)
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(num_threads, thread_name_prefix="leanmill-kernels")
    return _pools[key]
