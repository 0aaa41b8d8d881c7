"""Keeping the weights that do not train in fewer bytes, once it is known which those are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch
from torch import nn

from leanmill.core.branches import BASE
from leanmill.core.compact import Compact, Kind
from leanmill.core.errors import ConfigError
from leanmill.core.folders import SUMMARY
from leanmill.core.site import LinearSite, Site
from leanmill.core.sites import Candidate, Sites, iter_sites
from leanmill.core.stage import Slot
from leanmill.models.calls import uncalled
from leanmill.models.config import FrozenDtype, ModelConfig
from leanmill.models.summary import summary_of


def compact_frozen(
    model: nn.Module,
    frozen_dtype: FrozenDtype,
    precision: Literal["fp32", "bf16"],
    *,
    bases_are_read: bool = False,
    kinds: Mapping[str, Kind] | None = None,
) -> str:
    """Turn the frozen weights of a model on the meta device into ones of fewer bytes; return a line for the log.

    Linear and expert weights become what is asked for; embedding and head bf16, since fewer bits harm most there
    (so do QLoRA and torchao). What trains stays as it is, and so do norms, biases and routers, which are small.

    Args:
        model: A causal LM, all techniques installed and what trains decided.
        frozen_dtype: Of the recipe; `auto` is bf16 where the run computes in bf16, and leaves alone what cannot be.
        precision: The run's.
        bases_are_read: Whether branches read or write weights of the layers they wrap.
        kinds: For `stored`: how linear weights are kept, by the name of their layer; others are as with `auto`.

    Raises:
        ConfigError: Nothing is frozen; a technique adds to a frozen weight as training goes; a branch reads the weight
            it is beside; a mask or a quantiser stands on a weight that would be rounded to 8 or 4 bits before it; or a
            frozen weight is used in a way that nothing can be put before.
    """
    kind = precision if frozen_dtype in ("auto", "stored") else frozen_dtype
    kinds = kinds or {}
    if kind == "fp32" and not kinds:
        return ""
    sites = Sites(model)
    groups: dict[int, list[Candidate]] = {}
    written = _written(model)
    for candidate in sites.candidates.values():
        weight = _weight(model, candidate)
        if bases_are_read and BASE in candidate.module_path.split("."):
            if frozen_dtype != "auto":
                raise ConfigError(
                    f"model.frozen_dtype={frozen_dtype} would keep {candidate.name} in another form, and the adapter "
                    f"around it may read its weight as it is; set model.frozen_dtype=auto, or use {{type: lora}}"
                )
            continue
        if id(weight) in written:
            if frozen_dtype != "auto":
                raise ConfigError(
                    f"model.frozen_dtype={frozen_dtype} would round {candidate.name}, to which {written[id(weight)]} "
                    f"adds what it has trained; set model.frozen_dtype=auto"
                )
            continue
        if not weight.requires_grad and weight.is_floating_point():
            groups.setdefault(id(weight), []).append(candidate)
    if not groups and frozen_dtype != "auto":
        raise ConfigError(
            f"model.frozen_dtype={frozen_dtype}, but every linear, expert and embedding weight trains, so there is "
            f"nothing to keep in fewer bits; remove it, or add a technique that freezes, such as lora"
        )
    counts: Counter[str] = Counter()
    for group in groups.values():
        is_layer = all(one.kind in ("linear", "expert") for one in group)
        own = kinds.get(group[0].name)
        as_kind = own or (kind if is_layer or kind == "fp32" else "bf16")
        if as_kind == "fp32":
            continue
        is_asked = own is not None or frozen_dtype not in ("auto", "stored")
        if _compact(sites, group, cast(Kind, as_kind), precision, is_asked=is_asked):
            counts[as_kind] += 1
    shown = ", ".join(f"{number} in {name}" for name, number in counts.items())
    return f"frozen weights: {shown}" if shown else ""


def stored_kinds(config: ModelConfig) -> dict[str, Kind]:
    """Return how the pass that wrote a model's folder says that its weights are kept, by the name of the layer.

    Raises:
        ConfigError: `model.frozen_dtype` is `stored` and the folder says nothing.
    """
    if config.frozen_dtype != "stored" or config.path is None:
        return {}
    found = summary_of(config).get("kept_as")
    if not found or not isinstance(found, dict) or not set(found.values()) <= set(get_args(Kind)):
        raise ConfigError(
            f"model.frozen_dtype=stored, and {SUMMARY} in {config.path} does not say how weights are kept; give a "
            f"folder that the pass lq_lora wrote as model.path, or set model.frozen_dtype=nf4"
        )
    return found


def _compact(
    sites: Sites, group: list[Candidate], kind: Kind, precision: Literal["fp32", "bf16"], *, is_asked: bool
) -> bool:
    """Keep one parameter, which the weights of `group` share, as `kind`; return whether that was done."""
    model, weight = sites.model, _weight(sites.model, group[0])
    owners = [model.get_submodule(one.module_path) for one in group]
    is_staged = any(isinstance(owner, Site) and owner.is_staged for owner in owners)
    if all(one.kind in ("linear", "head") for one in group) and kind == precision and not is_staged:
        for one, owner in zip(group, owners, strict=True):
            owner._parameters[one.parameter_name] = nn.Parameter(weight.detach().to(torch.bfloat16), False)
        return True
    try:
        found = [sites.site_of(one) for one in group]
        _check(model, found, kind)
    except ConfigError:
        if is_asked:
            raise
        return False
    reads_rows = any(one.kind == "embedding" for one in group)
    is_reshaped = any(site.is_reshaped for site in found)
    dtype = torch.float32 if precision == "fp32" or is_reshaped or reads_rows else torch.bfloat16
    compact = Compact(weight.shape, kind, dtype, weight.device)
    kept = nn.Parameter(compact.empty(weight.device), requires_grad=False)
    for site in found:
        site.put(compact)
        owner, key = site.weight_at
        owner._parameters[key] = kept
    return True


def _written(model: nn.Module) -> dict[int, str]:
    """Which technique adds to a frozen weight as training goes, by the weight's id."""
    staged = ((site, stage) for _, site in iter_sites(model) for stage in site.weight_stages())
    return {id(site.raw_weight): stage.technique for site, stage in staged if stage.writes_weight}


def _weight(model: nn.Module, candidate: Candidate) -> nn.Parameter:
    return getattr(model.get_submodule(candidate.module_path), candidate.parameter_name)  # type: ignore[no-any-return]


def _check(model: nn.Module, sites: list[Site], kind: Kind) -> None:
    for site in sites:
        for slot in (Slot.MASK, Slot.QUANT):
            stage = site.stage(slot)
            if stage is not None and kind != "bf16":
                raise ConfigError(
                    f"model.frozen_dtype={kind} would round {site.site_name}, and {stage.technique} needs its values "
                    f"as they are; set model.frozen_dtype=bf16"
                )
    plain = {site.site_name: site for site in sites if isinstance(site, LinearSite) and not site.is_staged}
    missed = uncalled(model, plain)
    if missed:
        raise ConfigError(
            f"{type(model).__name__} multiplies with the weight of {missed[0]} without calling it, so it cannot be "
            f"kept in another form; set model.frozen_dtype=auto, or fp32"
        )
