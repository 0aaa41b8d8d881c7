"""How far this process is in each group's collectives, as torch's flight recorder has it (gloo and NCCL)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


NUM_ENTRIES = 2000
"""Collectives that the flight recorder remembers."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a rank is in the collectives of a group."""

    number: int
    """Counted from 1 in each group, the same on all of its ranks."""
    operation: str
    """Such as `all_reduce`."""
    sizes: tuple[tuple[int, ...], ...]
    """Shapes of what goes in."""
    is_done: bool

    def __str__(self) -> str:
        shapes = ", ".join(str(list(size)) for size in self.sizes)
        return f"{self.operation} {shapes} (number {self.number})"

    def state(self) -> dict[str, Any]:
        """JSON-able, for `from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Standing:
        """Return what `state` was taken of."""
        return cls(**{**state, "sizes": tuple(tuple(size) for size in state["sizes"])})


def start_recorder(*, is_dumped: bool) -> str:
    """Switch the recorder on for groups created from now on; return the prefix of the files that NCCL dumps.

    Args:
        is_dumped: Whether NCCL will be there and dump it after a time-out; it makes no folders itself.
    """
    folder = Path(tempfile.gettempdir()) / f"leanmill-flight-recorder-{os.environ.get('TORCHELASTIC_RUN_ID', 'run')}"
    prefix = str(folder / "rank_")
    # The recorder has no other switch than the environment; whoever set these already, wins.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(NUM_ENTRIES))
    if not is_dumped:
        return prefix
    # Torch renames the variables, so both spellings are set.
    os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", str(NUM_ENTRIES))
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    given = os.environ.get("TORCH_FR_DUMP_TEMP_FILE") or os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE") or prefix
    for name in ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"):
        os.environ.setdefault(name, given)
    Path(given).parent.mkdir(parents=True, exist_ok=True)
    return given


def standings() -> dict[str, Standing]:
    """Return this process's standing in each group that has had a collective, by the group's name."""
    return standings_of(recorded())


def recorded() -> dict[str, Any]:
    """Return what the recorder remembers, as torch writes it in JSON; empty where it is off or this torch has none."""
    # NCCL's builds have had a function of their own before there was one for all backends.
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is None:
            continue
        found: dict[str, Any] = json.loads(dump(includeCollectives=True, onlyActive=False))
        if found.get("entries"):
            return found
    return {}


def standings_of(record: Mapping[str, Any]) -> dict[str, Standing]:
    """See `standings`.

    Args:
        record: See `recorded`.
    """
    found: dict[str, Standing] = {}
    for entry in _collectives(record.get("entries", ())):
        group, standing = _read(entry)
        known = found.get(group)
        # NCCL is asked for more before what was asked for is done; gloo's caller waits, and its record of an
        # all-to-all is never closed.
        if known is None or known.is_done or entry["profiling_name"].startswith("gloo"):
            found[group] = standing
    return found


def _collectives(entries: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted((entry for entry in entries if not entry["is_p2p"]), key=lambda entry: entry["record_id"])


def _read(entry: Mapping[str, Any]) -> tuple[str, Standing]:
    name, description = entry["process_group"]
    standing = Standing(
        number=entry["collective_seq_id"],
        operation=entry["profiling_name"].partition(":")[2] or entry["profiling_name"],
        sizes=tuple(tuple(size) for size in entry["input_sizes"]),
        is_done=entry["retired"] or entry["state"] == "completed",
    )
    return f"{description} {name}" if description and description != "default_pg" else "all ranks", standing
