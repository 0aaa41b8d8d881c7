"""Run a function on several ranks inside a test.

Ranks are forked from the test process, because a fork costs half a second where a spawned
interpreter costs several (importing torch). They meet through a file, so no port can clash, and
compute with one thread each: a child that uses OpenMP threads its parent already started hangs.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


GRACE_SECONDS = 5.0
"""How long the other ranks may go on after one has failed; it usually takes them down as well."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 120.0) -> list[Any]:
    """Call `function(*args)` on every rank of a fresh gloo group and return the results by rank.

    The function may be a closure or a lambda. `RANK`, `LOCAL_RANK` and `WORLD_SIZE` are set as
    torchrun sets them, seeds are equal on all ranks, and the default group exists; ask
    `torch.distributed` for the rank.

    Args:
        function: What each rank runs; its result must be picklable (tensors come back on the CPU).
        world_size: Number of ranks; 1 runs one rank in a child, with a group of one.
        *args: Given to the function; shared by fork, not pickled.
        timeout_seconds: Wall time after which all ranks are killed.

    Raises:
        AssertionError: A rank raised, died or hung; the message holds its traceback.
    """
    context = multiprocessing.get_context("fork")
    # Whatever the parent has buffered would otherwise be written once more by every child.
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        readers: list[Connection] = []
        processes: list[BaseProcess] = []
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank_main,
                    args=(function, args, rank, world_size, Path(folder), writer, timeout_seconds),
                    daemon=True,
                )
                process.start()
                writer.close()
                readers.append(reader)
                processes.append(process)
            return _collect(processes, readers, Path(folder), timeout_seconds)
        finally:
            _kill(processes)
            for reader in readers:
                reader.close()


def _collect(
    processes: list[BaseProcess], readers: list[Connection], folder: Path, timeout_seconds: float
) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout_seconds
    while len(results) + len(failures) < len(readers):
        waiting = [r for rank, r in enumerate(readers) if rank not in results and rank not in failures]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            rank = readers.index(reader)  # type: ignore[arg-type]
            ok, payload = _receive(readers[rank], processes[rank])
            if ok:
                results[rank] = payload
                continue
            failures[rank] = payload
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    if failures:
        raise AssertionError("\n".join(f"rank {rank} failed:\n{text}" for rank, text in failures.items()))
    missing = [rank for rank in range(len(readers)) if rank not in results]
    if missing:
        stacks = "\n".join(_stack_of(rank, processes[rank], folder) for rank in missing)
        raise AssertionError(f"ranks {missing} of {len(readers)} hung for {timeout_seconds} s\n{stacks}")
    return [results[rank] for rank in range(len(readers))]


def _receive(reader: Connection, process: BaseProcess) -> tuple[bool, Any]:
    try:
        ok, data = reader.recv()
    except EOFError:
        process.join(timeout=GRACE_SECONDS)
        return False, f"died without a traceback, exit code {process.exitcode}"
    return ok, torch.load(io.BytesIO(data), weights_only=False) if ok else data


def _stack_of(rank: int, process: BaseProcess, folder: Path) -> str:
    """Ask a hung rank where it is."""
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.3)
    path = folder / f"stack-{rank}.txt"
    return f"rank {rank} was at:\n{path.read_text() if path.exists() else 'unknown'}"


def _kill(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.join(timeout=0.5)
        if process.is_alive():
            process.kill()
    for process in processes:
        process.join(timeout=GRACE_SECONDS)


def _rank_main(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    folder: Path,
    writer: Connection,
    timeout_seconds: float,
) -> None:
    # Registered with an open file, since pytest may have replaced stderr by something without one.
    stack_file = (folder / f"stack-{rank}.txt").open("w")
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    # What the test process holds stays: DeepSpeed collects garbage with every engine, a second each over all of that.
    gc.freeze()
    try:
        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        random.seed(0)
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
        result = function(*args)
        # Bytes, because tensors sent through a pipe share memory that dies with the sender.
        buffer = io.BytesIO()
        torch.save(result, buffer)
        writer.send((True, buffer.getvalue()))
    except BaseException:
        writer.send((False, traceback.format_exc()))
    finally:
        writer.close()
        sys.stdout.flush()
        sys.stderr.flush()
        # Not through the interpreter's exit: gloo threads may abort there, and pytest's own
        # atexit handlers belong to the parent.
        os._exit(0)
