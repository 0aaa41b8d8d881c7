"""Splitting the weights of a model over the ranks of tensor-parallel groups."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from leanmill.core.around import arounds, put_around
from leanmill.core.branches import base_of, branched_layers, factor_layers, has_factors
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.site import EmbeddingSite, LinearSite, Site
from leanmill.parallel.collectives import reduced
from leanmill.parallel.layout import Layout
from leanmill.parallel.sequence_parallel import RegionSplit, TokenParts, region_shares, split_tokens
from leanmill.parallel.tensor_exchange import GroupSplit, PickedRows
from leanmill.parallel.tensor_plan import Share, tensor_plan
from leanmill.parallel.tensors import local


def split_model(model: nn.Module, layout: Layout, *, replicated: bool) -> PartialGradients:
    """Turn what a tensor-parallel group shares into DTensors over its ranks, and let sites exchange activations.

    Args:
        model: The causal LM on the meta device, with everything its techniques add.
        layout: With a `tp` above 1.
        replicated: Whether the parts have replicas on the ranks that read different data, which are dims of the
            DTensors then; else an engine shards the parts further.

    Returns:
        What adds up gradients of which ranks see parts.

    Raises:
        ConfigError: See `tensor_plan`; or a technique's part cannot be shared.
    """
    # It calls gathering over two dims of a mesh slow, whoever asks for a whole weight, and says so on every rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    group = layout.grid.get_group("tp")
    mesh, leading = (layout.grid["replicate", "tp"], (Replicate(),)) if replicated else (layout.grid["tp"], ())
    shares = tensor_plan(model, layout.tp)
    tokens = TokenParts(group) if layout.sequence_parallel else None
    in_regions = region_shares(model, shares) if tokens is not None else ()
    partial = [] if tokens is None else split_tokens(model, tokens, shares)
    split: dict[int, nn.Parameter] = {}
    for share in shares:
        if share.kind == "partial":
            partial += model.get_submodule(share.path).parameters()
            continue
        if share.kind == "counts":
            vars(model.get_submodule(share.path)).update(share.counts)
            continue
        site, of_tokens = _site_at(model, share), tokens if share.path in in_regions else None
        _split_site(site, _split_of(share, group, of_tokens), _Places(mesh, leading, split), share.name)
        if share.rows is not None or of_tokens is not None:
            partial += _seeing_parts(site)
    for path, layer in branched_layers(model):
        partial += _split_branches(clean_name(path), layer, _Places(mesh, leading, split))
    return PartialGradients(partial, group)


def _seeing_parts(site: Site) -> Iterator[nn.Parameter]:
    """Yield what is whole on every rank, and sees in a region or of a weight the rank's part alone."""
    bias: nn.Parameter | None = getattr(site, "bias", None)
    assert site.split is not None
    if isinstance(site.split, PickedRows):
        yield from [] if bias is None else [bias]
        if len(site.stages) == 0:
            yield site.raw_weight  # type: ignore[misc]
    elif site.split.by_rows:
        yield from site.inputs.parameters()
    elif bias is not None:
        yield bias


class _Places:
    """Puts parameters on the mesh of a group, each once: tied ones stay one."""

    def __init__(self, mesh: DeviceMesh, leading: tuple[Placement, ...], made: dict[int, nn.Parameter]) -> None:
        self._mesh, self._leading, self._made = mesh, leading, made

    def shard(self, parameter: nn.Parameter, dim: int) -> nn.Parameter:
        """Return `parameter`, split along `dim`."""
        if isinstance(parameter, DTensor):
            return parameter
        if id(parameter) not in self._made:
            made = nn.Parameter(self._as_dtensor(parameter.detach(), dim), parameter.requires_grad)
            # The key is an id: the old parameter lives on beside its new form.
            made.__dict__["_whole_meta"] = parameter
            self._made[id(parameter)] = made
        return self._made[id(parameter)]

    def _as_dtensor(self, whole: Tensor, dim: int) -> Tensor:
        size = whole.shape[dim] // self._mesh.size(self._mesh.ndim - 1)
        part = whole.narrow(dim, self._mesh.get_local_rank(self._mesh.ndim - 1) * size, size)
        part = torch.empty_like(part, memory_format=torch.contiguous_format) if part.is_meta else part.clone()
        placements = (*self._leading, Shard(dim))
        return DTensor.from_local(
            part, self._mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )


def _site_at(model: nn.Module, share: Share) -> Site:
    """Return the site at a place, converting a plain module that is none yet."""
    module = model.get_submodule(share.path)
    if isinstance(module, Site):
        return module
    kind: Any = EmbeddingSite if isinstance(module, nn.Embedding) else LinearSite
    site = kind.adopt(module, share.name)
    parent, _, leaf = share.path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, site)
    for around in list(arounds(module)):
        put_around(site, around)
    return site  # type: ignore[no-any-return]


def _split_of(share: Share, group: dist.ProcessGroup, tokens: TokenParts | None) -> GroupSplit:
    by_rows = share.kind != "columns"
    if share.rows is not None:
        return PickedRows(group, share.rows)
    if tokens is not None:
        return RegionSplit(
            tokens, by_rows=by_rows, gathers_output=share.gathers_output, splits_input=share.splits_input
        )
    return GroupSplit(group, by_rows=by_rows, gathers_output=share.gathers_output, splits_input=share.splits_input)


def _split_site(site: Site, split: GroupSplit, places: _Places, name: str) -> None:
    module: Any = site
    if not module.weight.is_floating_point():
        raise ConfigError(
            f"layout.tp shares {name}, whose frozen weight is kept as codes; set model.frozen_dtype=bf16, or "
            f"layout.tp=1"
        )
    site.split = split
    if isinstance(split, PickedRows):
        return
    module.weight = places.shard(module.weight, split.dim)
    if split.by_rows and getattr(module, "bias", None) is not None:
        module.bias = places.shard(module.bias, 0)


def _split_branches(name: str, layer: Any, places: _Places) -> list[nn.Parameter]:
    """Split the factors beside a split layer: B as its rows are, A as its columns are.

    Returns:
        The factors that are whole, where ranks see parts of tokens or of rows that they pick.
    """
    base = base_of(layer)
    split = base.split if isinstance(base, Site) else None
    if not isinstance(split, GroupSplit):
        return []
    if not has_factors(layer) or isinstance(base, EmbeddingSite):
        raise ConfigError(
            f"layout.tp shares {name}, and the adapter beside it is more than two factors; use lora without variants, "
            f"leave {name} out of its targets, or set layout.tp=1"
        )
    inner, outer = factor_layers(layer)
    factors, others = (outer, inner) if split.by_rows else (inner, outer)
    for adapter, factor in list(factors.items()):
        site = LinearSite.adopt(factor, f"{name}.{adapter}")  # type: ignore[arg-type]
        factors[adapter] = site
        _split_site(site, split, places, name)
    if isinstance(split, PickedRows):
        return list(factors.parameters())
    return list(others.parameters()) if isinstance(split, RegionSplit) else []


class PartialGradients:
    """Parameters that every rank of a group has, of whose gradient each sees the part of its own heads.

    Args:
        parameters: Which ones, before an engine shards them; their modules are looked at when gradients are complete.
        group: The ranks.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup | None) -> None:
        self._ids, self._group = {id(parameter) for parameter in parameters}, group
        self._live: list[tuple[nn.Module, str]] = []

    def find(self, module: nn.Module) -> None:
        """Note where they are, before they are replaced by shards."""
        self._live = list(self._places(module))

    def _places(self, module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
        for owner in module.modules():
            for key, parameter in owner._parameters.items():
                if parameter is not None and id(parameter) in self._ids:
                    yield owner, key

    @torch.no_grad()
    def add_up(self) -> None:
        """Replace their gradients by the sums over the group, in one collective a dtype."""
        found = [owner._parameters[key] for owner, key in self._live]
        gradients = [local(p.grad) for p in found if p is not None and p.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            same = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = reduced(torch.cat([gradient.reshape(-1) for gradient in same]), "sum", self._group)
            for gradient, part in zip(same, flat.split([g.numel() for g in same]), strict=True):
                gradient.copy_(part.view_as(gradient))
