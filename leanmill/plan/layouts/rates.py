"""How fast ranks compute, send and store: what a predicted step time is made of."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way between two memories, as one rank has it while all others use theirs."""

    bytes_per_second: float
    """One way."""
    seconds: float = 0.0
    """Of a message of no bytes, from one to the next."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One rank of a machine, and its links."""

    name: str
    matmul_flops: float
    """FLOP/s of large matmuls in the run's precision."""
    half_size: float
    """Rows, columns or inner dim at which a matmul reaches half of that for the dim alone: a dim d reaches
    d / (d + half_size), and a matmul the product over its three."""
    memory: Link
    """The rank's own memory, as element-wise work reads and writes it; `seconds` is the start of one operation."""
    starts_ahead: bool = True
    """Whether operations are started while earlier ones compute (CUDA): only short ones wait for their start."""
    inside: Link
    """To a rank of the same machine."""
    between: Link
    """To a rank of another machine, all ranks of a machine sending at once."""
    overlap: float = 0.9
    """Share of computing time in which communication goes on at full speed beside it."""
    host: Link = Link(bytes_per_second=25e9)  # noqa: RUF009 (frozen)
    """Between a rank's device and host memory."""
    host_memory: Link = Link(bytes_per_second=25e9)  # noqa: RUF009
    """Host memory as an optimizer step on the CPU reads and writes it, a rank's share."""
    nvme: Link = Link(bytes_per_second=1.5e9)  # noqa: RUF009
    """Between host memory and NVMe, a rank's share."""


def _gpu(name: str, tflops: float, memory: float, inside: float, between: float, host: float) -> Rates:
    """What large matmuls and messages usually reach of data sheets: three quarters and four fifths."""
    return Rates(
        name=name,
        matmul_flops=0.75 * tflops * 1e12,
        half_size=96,
        memory=Link(bytes_per_second=0.8 * memory * 1e9, seconds=4e-6),
        inside=Link(bytes_per_second=0.8 * inside * 1e9, seconds=2e-6),
        between=Link(bytes_per_second=0.8 * between * 1e9, seconds=8e-6),
        host=Link(bytes_per_second=0.8 * host * 1e9),
    )


DEVICES: dict[str, Rates] = {
    rates.name: rates
    for rates in (
        _gpu("a100", 312, 2039, 300, 25, 32),
        _gpu("h100", 989, 3350, 450, 50, 64),
        _gpu("h200", 989, 4800, 450, 50, 64),
        _gpu("b200", 2250, 8000, 900, 50, 64),
    )
}
"""By name, bf16 dense: matmuls, memory and NVLink (one way) of NVIDIA's data sheets, an InfiniBand card a GPU
(200 Gbit/s with the A100, 400 else). None of these has been measured; `--rates measured` does so on a machine."""


def read_rates(source: str) -> Rates:
    """Return the rates of a known device, or those of a YAML file as `as_yaml` writes it.

    Raises:
        ConfigError: Neither, or the file lacks a rate.
    """
    if source in DEVICES:
        return DEVICES[source]
    path = Path(source)
    if not path.is_file():
        near = near_names(source, DEVICES)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(DEVICES)}, measured, or a YAML file"
        raise ConfigError(f"--rates {source} is no device known here and no file; {hint}")
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return _from_plain(raw)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"--rates {source} is not a file of rates: {error}; write one with --rates measured --rates-out {source}"
        ) from error


def as_yaml(rates: Rates) -> str:
    """Return a file for `read_rates`."""
    return yaml.safe_dump(dataclasses.asdict(rates), sort_keys=False)


def _from_plain(raw: dict[str, Any]) -> Rates:
    links = {f.name for f in dataclasses.fields(Rates) if f.type == "Link"}
    values: dict[str, Any] = {key: Link(**value) if key in links else value for key, value in raw.items()}
    return Rates(**values)


def with_given(
    rates: Rates, *, matmul_tflops: float | None, link_gb: float | None, node_link_gb: float | None
) -> Rates:
    """Return the rates with what a person knows better.

    Args:
        rates: Of a device.
        matmul_tflops: Of large matmuls on one rank, TFLOP/s.
        link_gb: Of a rank inside its machine, GB/s one way.
        node_link_gb: Of a rank to other machines, GB/s one way.
    """
    changes: dict[str, Any] = {}
    if matmul_tflops is not None:
        changes["matmul_flops"] = matmul_tflops * 1e12
    if link_gb is not None:
        changes["inside"] = dataclasses.replace(rates.inside, bytes_per_second=link_gb * 1e9)
    if node_link_gb is not None:
        changes["between"] = dataclasses.replace(rates.between, bytes_per_second=node_link_gb * 1e9)
    return dataclasses.replace(rates, **changes)
