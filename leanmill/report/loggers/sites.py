"""Statistics of the effective weight of every site: sparsity, levels, histogram."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from leanmill.parallel.collectives import gather_objects
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
OVER_TIME = ("norm", "zero_fraction", "num_levels", "pq_index")
"""Of each site's statistics, what is kept of every evaluation."""
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
        self._history: list[dict[str, Any]] = []
        self.sites: list[dict[str, Any]] = []
        """Of the newest evaluation, on rank 0; see `site_statistics`."""

    def on_start(self, info: RunInfo) -> None:
        self._info, self._step = info, info.start_step
        if info.rank == 0 and info.start_step:
            # A resumed run goes on with what was seen before the step it resumes from.
            self._history = [one for one in _read(self._path).get("history", []) if one["step"] <= info.start_step]

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
        rank, layout = self._info.rank, self._info.engine.layout
        norms = PathNorms(self._info.engine)
        sites = list(site_statistics(self._info.engine, compute=layout.rank_in_stage(rank) == 0, also=norms.see))
        path_norms = norms.found()
        if layout.pp > 1:
            parts = gather_objects([sites, path_norms])
            sites = sorted((site for part, _ in parts for site in part), key=lambda site: _in_order(site["name"]))
            path_norms = {name: norm for _, found in parts for name, norm in sorted(found.items())}
        if rank == 0:
            self.sites = sites
            self._remember()
            document = {"step": self._step, "tokens": self._tokens, "group_size": GROUP_SIZE, "sites": sites}
            document |= {"path_norms": path_norms, "history": self._history}
            write_atomically(self._path, json.dumps(document))

    def _remember(self) -> None:
        """Keep what a chart over time shows of each site; a step that is done again replaces itself."""
        by_site = {site["name"]: {key: site[key] for key in OVER_TIME} for site in self.sites}
        earlier = [one for one in self._history if one["step"] < self._step]
        self._history = [*earlier, {"step": self._step, "sites": by_site}]


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort blocks by their number, where stages of a pipeline have theirs in turn."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _read(path: Path) -> dict[str, Any]:
    """What an earlier start wrote; nothing where there is none, or it is cut off."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def site_statistics(
    engine: Engine, *, compute: bool = True, also: Callable[[str, Tensor], None] = lambda name, weight: None
) -> Iterator[dict[str, Any]]:
    """Yield the statistics of every site of the engine's model; all ranks call together.

    Args:
        engine: A prepared engine.
        compute: False only takes part in gathering and yields nothing.
        also: Is shown each effective weight beside.
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
        also(name, weight)
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
        JSON-able: `shape`; `norm`, Euclidean, of the finite values; `zero_fraction`; `num_levels`, distinct
        values, and `num_levels_per_row`, the most in one row, which tells a scale per row from a scale per
        tensor (both capped at MAX_LEVELS, counted on up to a million weights); `group_zeros`, how many groups
        of GROUP_SIZE along the last dim have 0, 1, ... zeros; `two_of_four`, the share of groups with at least
        half zeros; `pq_index`, see `pq_index`; `histogram` counts in equal bins from `low` to `high`;
        `num_non_finite`.
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
        "norm": torch.linalg.vector_norm(finite).item(),
        "zero_fraction": (values == 0).float().mean().item() if values.numel() else 0.0,
        **_count_levels(values),
        "group_zeros": groups,
        "two_of_four": sum(groups[GROUP_SIZE // 2 :]) / num_groups if num_groups else None,
        "pq_index": pq_index(values),
        "histogram": torch.histc(finite, bins=NUM_BINS, min=-high, max=high).long().tolist(),
        "low": -high,
        "high": high,
        "num_non_finite": values.numel() - finite.numel(),
    }


def pq_index(weight: Tensor) -> float | None:
    """Return how unequal the magnitudes of what is left of a weight are: 0 are equal, towards 1 a few hold all.

    1 - d^(1/q - 1/p) ||w||_p / ||w||_q over the d weights that are not zero, with p = 1/2 and q = 1 (Diao et al. 2023,
    arXiv:2302.05601, eq. 1); None where nothing is left, or a weight is no number. By their theorem 2 a share of at
    most this can be pruned where what goes is to hold nothing of the norm.
    """
    left = weight[weight != 0].abs().double()
    if not left.numel() or not bool(left.isfinite().all()):
        return None
    return max(0.0, float(1 - left.sqrt().mean().square() / left.mean()))


class PathNorms:
    """Path norms of dense MLPs: sums over all paths of the products of magnitudes along them.

    (Neyshabur et al. 2015, arXiv:1503.00036; for networks as they are built now Gonon et al. 2023, arXiv:2310.01225.)
    With weights V [H, N] after the activation and U [N, H] before it that is the sum of |V| |U|; with a gate G [N, H]
    beside U, whose paths multiply, of |V| (|U| 1 * |G| 1). It bounds the MLP: ||MLP(x)||_1 is at most that times max
    |x|, squared with a gate, for activations with |f(x)| <= |x| (ReLU, GELU, SiLU) and without biases.

    Args:
        engine: Owner of the sites.
    """

    def __init__(self, engine: Engine) -> None:
        from leanmill.core.places import find_modules

        model = cast("nn.Module", engine.module.model)
        self._mlps = [path for path, _, _ in find_modules(model, "mlp")]
        self._sums: dict[str, dict[str, tuple[Tensor, Tensor]]] = {path: {} for path in self._mlps}

    def see(self, name: str, weight: Tensor) -> None:
        """Take the sums of magnitudes of each row and each column of a weight of an MLP."""
        mlp = next((path for path in self._mlps if name.startswith(f"{path}.")), None)
        if mlp is not None and weight.dim() == 2:
            magnitude = weight.detach().abs().double()
            self._sums[mlp][name] = magnitude.sum(1), magnitude.sum(0)

    def found(self) -> dict[str, float]:
        """Return the norm of each MLP all of whose weights were seen, by its path."""
        norms = {mlp: _path_norm(list(sums.values())) for mlp, sums in self._sums.items()}
        return {mlp: norm for mlp, norm in norms.items() if norm is not None}


def _path_norm(sums: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """The norm of weights in the order of registration, the last one being after the activation."""
    if len(sums) < 2 or any(len(rows) != len(sums[-1][1]) for rows, _ in sums[:-1]):
        return None
    product = sums[-1][1]
    for rows, _ in sums[:-1]:
        product = product * rows
    norm = float(product.sum())
    return norm if math.isfinite(norm) else None


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
