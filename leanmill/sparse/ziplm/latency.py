"""How long attention of so many heads, and an MLP of so many neurons, takes here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.paths import expand_user
from leanmill.sparse.structured.timing import least_times


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a latency is of."""

    batch_size: int
    sequence_length: int
    table: str | None
    """File that it is read from, or written to."""


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Microseconds of a forward, by size; 0 of size 0."""

    groups: dict[int, float]
    """Of attention, by key-value heads with their query heads, its norm included."""
    neurons: dict[int, float]
    """Of an MLP, its norm included."""


def read_table(path: str) -> Latencies:
    """Read a table that `write_table` wrote.

    Raises:
        ConfigError: It is none.
    """
    try:
        found = json.loads(Path(expand_user(path)).read_text(encoding="utf-8"))
        tables = [{int(size): _latency(us) for size, us in found[key].items()} for key in ("groups", "neurons")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"ziplm.latency_table {path} is no table ({error!r}); it holds microseconds by size, as in "
            f'{{"groups": {{"8": 120.0}}, "neurons": {{"1024": 90.0}}}}; remove the file to have it measured here'
        ) from error
    return Latencies(groups=tables[0], neurons=tables[1])


def _latency(value: float) -> float:
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"no latency is {value}")
    return float(value)


def write_table(path: str, latencies: Latencies) -> None:
    """Write latencies as JSON; ranks may do so at once, as they agree on them."""
    document = {"unit": "microseconds", "groups": latencies.groups, "neurons": latencies.neurons}
    target = Path(expand_user(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(target)


def measure(
    layer: Callable[[int, int], Any], groups: Sequence[int], neurons: Sequence[int], hidden: Tensor
) -> Latencies:
    """Measure attentions and MLPs of some sizes, each on hidden states [B, S, H].

    Args:
        layer: Returns a decoder layer of so many key-value heads and neurons, with what its attention is called with.
        groups: Numbers of key-value heads.
        neurons: Numbers of neurons.
        hidden: What they see; its device and dtype count.
    """
    jobs: dict[tuple[str, int], Callable[[], Any]] = {}
    for number in groups:
        module, arguments = layer(number, 1)
        jobs["groups", number] = lambda module=module, arguments=arguments: module.self_attn(  # type: ignore[misc]
            hidden_states=module.input_layernorm(hidden), **arguments
        )
    for number in neurons:
        module, _ = layer(1, number)
        jobs["neurons", number] = lambda module=module: module.mlp(module.post_attention_layernorm(hidden))  # type: ignore[misc]
    least = least_times(jobs, hidden.device)
    return Latencies(
        groups={0: 0.0} | {size: us for (kind, size), us in least.items() if kind == "groups"},
        neurons={0: 0.0} | {size: us for (kind, size), us in least.items() if kind == "neurons"},
    )
