"""Statistics of the effective weight of every site: sparsity, levels, histogram."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from leanmill.report.files import write_atomically
from leanmill.report.observer import EvalRecord, Observer, RunInfo, StepRecord


if TYPE_CHECKING:
    from torch import Tensor, nn

    from leanmill.core.site import Site
    from leanmill.core.stage import Stage
    from leanmill.parallel.engine import Engine

FILE_NAME = "sites.json"
NUM_BINS = 64
GROUP_SIZE = 4
"""Weights along the contraction dim whose zeros are counted together; 2:4 has at least 2 in each."""
MAX_LEVELS = 256
"""Distinct values are counted up to here; more is as good as continuous."""
_MAX_SAMPLED = 1 << 20
"""Weights of a site looked at when distinct values are counted, which sorts them."""


class SiteStatistics(Observer):
    """Writes `sites.json` at each evaluation and at the end. Runs on every rank.

    One site at a time is gathered by all ranks, in the same order; rank 0 then runs the site's
    stages on a CPU copy. Nothing of the live, maybe sharded modules is called or changed.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self._info: RunInfo | None = None
        self._step = 0
        self._tokens = 0
        self._written_at = -1

    def on_start(self, info: RunInfo) -> None:
        self._info, self._step = info, info.start_step

    def on_step(self, record: StepRecord) -> None:
        self._step, self._tokens = record.step, record.tokens

    def on_eval(self, record: EvalRecord) -> None:
        self._step, self._tokens = record.step, record.tokens
        self._collect()

    def on_end(self, status: str, message: str = "") -> None:
        # After a failure the other ranks may be gone, and a collective would wait for them.
        if status == "finished" and self._written_at != self._step:
            self._collect()

    def _collect(self) -> None:
        assert self._info is not None, "on_start comes first"
        self._written_at = self._step
        rank = self._info.rank
        sites = list(site_statistics(self._info.engine, compute=rank == 0))
        if rank == 0:
            document = {"step": self._step, "tokens": self._tokens, "group_size": GROUP_SIZE, "sites": sites}
            write_atomically(self._path, json.dumps(document))


def site_statistics(engine: Engine, *, compute: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the statistics of every site of the engine's model; all ranks call together.

    Args:
        engine: A prepared engine.
        compute: False only takes part in gathering and yields nothing.
    """
    from leanmill.core.sites import iter_sites
    from leanmill.parallel.naming import state_parameters

    model = cast("nn.Module", engine.module.model)
    # By identity: a site may sit inside wrappers, share a tied weight, or (experts) own none itself.
    names = {id(parameter): name for name, parameter in state_parameters(model)}
    for name, site in iter_sites(model):
        weight, stages = gather_site(engine, site, names)
        if not compute:
            continue
        for stage in stages:
            weight = stage.forward(weight)
        yield {"name": name, "techniques": [stage.technique for stage in stages], **weight_statistics(weight)}


def gather_site(engine: Engine, site: Site, names: Mapping[int, str]) -> tuple[Tensor, list[Stage]]:
    """Gather a site's weight and CPU copies of its stages, in slot order. A collective.

    Args:
        engine: Owner of the site.
        site: A site of `engine.module.model`.
        names: Name of every live parameter by its id.
    """
    from leanmill.core.copies import cpu_copy

    def gather(parameter: Tensor) -> Tensor:
        return engine.full_parameter(names[id(parameter)]).detach()

    weight = gather(site.raw_weight)
    stages = []
    for stage in site.weight_stages():
        full = {name: gather(parameter) for name, parameter in stage.named_parameters()}
        stages.append(cast("Stage", cpu_copy(stage, full)))
    return weight, stages


def weight_statistics(weight: Tensor) -> dict[str, Any]:
    """Describe one weight `[..., out, in]`.

    Returns:
        JSON-able: `shape`; `zero_fraction`; `num_levels`, distinct values, and `num_levels_per_row`,
        the most in one row, which tells a scale per row from a scale per tensor (both capped at
        MAX_LEVELS, counted on up to a million weights); `group_zeros`, how many groups of GROUP_SIZE
        along the last dim have 0, 1, ... zeros; `two_of_four`, the share of groups with at least
        half zeros; `histogram` counts in equal bins from `low` to `high`; `num_non_finite`.
    """
    import torch

    values = weight.detach().float()
    finite = values[torch.isfinite(values)]
    # Symmetric, so that zero is in the middle; a weight of zeros still needs a width.
    high = (finite.abs().max().item() if finite.numel() else 0.0) or 1.0
    groups = _group_zeros(values)
    num_groups = sum(groups)
    return {
        "shape": list(values.shape),
        "zero_fraction": (values == 0).float().mean().item() if values.numel() else 0.0,
        **_count_levels(values),
        "group_zeros": groups,
        "two_of_four": sum(groups[GROUP_SIZE // 2 :]) / num_groups if num_groups else None,
        "histogram": torch.histc(finite, bins=NUM_BINS, min=-high, max=high).long().tolist(),
        "low": -high,
        "high": high,
        "num_non_finite": values.numel() - finite.numel(),
    }


def _group_zeros(values: Tensor) -> list[int]:
    """Groups by their number of zeros, `[GROUP_SIZE + 1]`; a last group that is short is left out."""
    import torch

    num_columns = values.shape[-1] // GROUP_SIZE * GROUP_SIZE
    zeros = (values[..., :num_columns] == 0).reshape(-1, GROUP_SIZE).sum(-1)
    return torch.bincount(zeros, minlength=GROUP_SIZE + 1).tolist()


def _count_levels(values: Tensor) -> dict[str, int]:
    rows = values.reshape(-1, values.shape[-1])
    stride = max(1, -(-values.numel() // _MAX_SAMPLED))
    rows = rows[::stride]
    ordered = rows.sort(dim=-1).values
    per_row = (ordered.diff(dim=-1) != 0).sum(-1).max().item() + 1 if rows.numel() else 0
    return {
        "num_levels": min(int(rows.unique().numel()), MAX_LEVELS),
        "num_levels_per_row": min(int(per_row), MAX_LEVELS),
    }
