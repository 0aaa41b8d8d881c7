"""Rates of this machine, measured with as many ranks at once as it will train with.

Ranks of one machine share cores, caches and memory, so each is measured while the others do the same. What lies
between machines, and NVMe, this cannot see: those rates are the ones inside, and a person gives better ones.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.nn import functional

from leanmill.core.errors import RunError
from leanmill.core.quiet import quiet_libraries
from leanmill.plan.layouts.rates import Link, Rates


LIMIT_SECONDS = 120
_LARGE = {"cpu": 1024, "cuda": 8192}
_MESSAGE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
_CHAIN = 50
"""Small operations one after the other."""


def measure(num_ranks: int, precision: str, device_type: str) -> Rates:
    """Return the rates of `num_ranks` ranks of this machine.

    Args:
        num_ranks: Ranks that train on it.
        precision: `bf16` or `fp32`, of the matmuls.
        device_type: `cpu` or `cuda`.

    Raises:
        RunError: A process failed.
    """
    if device_type == "cuda":
        num_ranks = min(num_ranks, torch.cuda.device_count())
    with tempfile.TemporaryDirectory(prefix="leanmill-rates-") as name:
        context = multiprocessing.start_processes(
            _rank, args=(num_ranks, precision, device_type, name), nprocs=num_ranks, join=False, start_method="spawn"
        )
        assert context is not None
        for process in context.processes:
            process.join(LIMIT_SECONDS)
            if process.is_alive():
                process.kill()
        found = []
        for rank in range(num_ranks):
            path = Path(name) / f"rates-{rank}.json"
            if not path.exists():
                raise RunError(f"rank {rank} of {num_ranks} ended without rates, or took {LIMIT_SECONDS} s")
            found.append(json.loads(path.read_text(encoding="utf-8")))
    of = {key: statistics.median(one[key] for one in found) for key in found[0]}
    memory = Link(bytes_per_second=of["memory"], seconds=of["operation"])
    inside = Link(bytes_per_second=of["link"], seconds=of["hop"])
    own = (
        {"host": memory, "host_memory": memory} if device_type == "cpu" else {"host": Link(bytes_per_second=of["host"])}
    )
    return Rates(
        name=f"measured on {num_ranks} ranks, {precision}",
        matmul_flops=of["matmul"],
        half_size=of["half_size"],
        memory=memory,
        starts_ahead=device_type == "cuda",
        inside=inside,
        between=inside,
        overlap=of["overlap"],
        **own,
    )


def _rank(rank: int, num_ranks: int, precision: str, device_type: str, folder: str) -> None:
    quiet_libraries()
    if device_type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if device_type == "cpu" else "nccl",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=LIMIT_SECONDS / 2),
    )
    with torch.no_grad():
        found = _Measured(device, torch.bfloat16 if precision == "bf16" else torch.float32, num_ranks).all()
    Path(folder, f"rates-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)  # gloo's threads may abort in the interpreter's exit


class _Measured:
    """One rank's measurements; the ranks take the same ones together."""

    def __init__(self, device: torch.device, dtype: torch.dtype, num_ranks: int) -> None:
        self.device, self.dtype, self.num_ranks = device, dtype, num_ranks
        self.size = _LARGE[device.type]

    def all(self) -> dict[str, float]:
        weight = torch.full((self.size, self.size), 0.01, dtype=self.dtype, device=self.device)
        few = 64 if self.device.type == "cpu" else 256
        large, small = (
            self.seconds(lambda: self._matmul(weight, self.size)),
            self.seconds(lambda: self._matmul(weight, few)),
        )
        flops, of_few = 2 * self.size**3 / large, 2 * few * self.size**2 / small
        message = torch.ones(_MESSAGE_BYTES[self.device.type] // 4, device=self.device)
        share = 2 * (self.num_ranks - 1) / self.num_ranks
        found = {
            "matmul": flops,
            "half_size": max(1.0, few * (flops / of_few - 1)),
            "memory": self._memory(),
            "operation": self._operation(),
            "link": 1e12,
            "hop": 0.0,
            "overlap": 0.0,
        }
        if self.num_ranks > 1:
            token = torch.ones(8, device=self.device)
            empty, full = self.seconds(lambda: dist.all_reduce(token)), self.seconds(lambda: dist.all_reduce(message))
            rounds = 2 * (self.num_ranks - 1).bit_length()
            found["link"] = share * 4 * message.numel() / max(1e-9, full - empty)
            found["hop"] = empty / rounds
            found["overlap"] = self._overlap(weight, large, message, full)
        if self.device.type == "cuda":
            pinned = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
            found["host"] = pinned.numel() / self.seconds(lambda: pinned.to(self.device, non_blocking=True))
        return found

    def seconds(self, action: Callable[[], Any], times: int = 7) -> float:
        """Median time of an action that all ranks do at once."""
        taken = []
        for _ in range(times + 2):
            dist.barrier()
            self._wait()
            began = time.perf_counter()
            action()
            self._wait()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[2:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _matmul(self, weight: Tensor, rows: int) -> Tensor:
        return functional.linear(weight[:rows], weight)

    def _memory(self) -> float:
        values = torch.ones(_MESSAGE_BYTES[self.device.type], dtype=self.dtype, device=self.device)
        out = torch.empty_like(values)
        return 2 * values.numel() * values.element_size() / self.seconds(lambda: torch.mul(values, 2.0, out=out))

    def _operation(self) -> float:
        """Seconds of one small operation of a forward or a backward."""
        value = torch.ones(64, device=self.device, requires_grad=True)

        def chain() -> None:
            with torch.enable_grad():
                out = value
                for _ in range(_CHAIN):
                    out = out * 1.0
                out.sum().backward()  # type: ignore[no-untyped-call]

        return self.seconds(chain) / (2 * _CHAIN)

    def _overlap(self, weight: Tensor, matmul_seconds: float, message: Tensor, reduce_seconds: float) -> float:
        """Share of computing during which a reduction goes on as if alone."""
        rounds = max(1, round(reduce_seconds / matmul_seconds))

        def both() -> None:
            work = dist.all_reduce(message, async_op=True)
            for _ in range(rounds):
                self._matmul(weight, self.size)
            assert work is not None
            work.wait()

        saved = reduce_seconds + rounds * matmul_seconds - self.seconds(both)
        return min(1.0, max(0.0, saved / min(reduce_seconds, rounds * matmul_seconds)))
