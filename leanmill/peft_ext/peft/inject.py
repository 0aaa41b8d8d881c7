"""Wrapping layers by PEFT's own code, on a model without storage, and what its adapters start from.

A model is wrapped on the meta device, before it is sharded, so PEFT's own start values would be lost. They
are made again once the base is loaded: PEFT wraps a copy of the plain model that has no storage but for the
layer at hand, and what it fills there is copied to the live adapters. So a start is PEFT's own, the same
on any number of ranks, and costs one layer's memory beside the adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from leanmill.core.branches import (
    adapter_config,
    base_of,
    branch_modules,
    branch_tensors,
    branched_layers,
    copy_untracked,
    is_branched,
)
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name, state_name
from leanmill.core.paths import expand_user
from leanmill.core.quiet import ignore_warning
from leanmill.core.site import Site
from leanmill.core.sites import Sites, matches
from leanmill.core.technique import Installation
from leanmill.parallel.tensors import assign, full


def adapters(
    sites: Sites,
    *,
    method: str,
    options: Mapping[str, Any],
    targets: Sequence[str] | None,
    exclude: Sequence[str],
    wraps: Literal["linear", "norm", "embedding"],
    reads_weight: bool,
    starts_from_weight: bool,
    changes_base: bool,
    seed: int,
    start: str | None = None,
) -> Installation:
    """Return an installation that wraps layers by a method of PEFT once all stages are in place.

    Args:
        sites: Of the model.
        method: PEFT's name of the method, in lower case.
        options: Of PEFT's configuration.
        targets: Patterns of layers to wrap; None takes all of the kind that the method wraps.
        exclude: Patterns of layers to leave out.
        wraps: The kind.
        reads_weight: Whether the method computes from the weight itself, so that no stage may stand on it.
        starts_from_weight: Whether its start depends on the weight.
        changes_base: Whether its start moves a part of the weight into the adapter.
        seed: Of the run, for starts.
        start: Folder of an adapter that they start from instead.

    Raises:
        ConfigError: PEFT refuses the options, or a layer cannot be wrapped.
    """
    names = _selected(sites, method, targets, exclude, wraps)
    config = _peft_config(method, options, names, seed)
    wrapping = _Wrapping(method, config, seed, starts_from_weight or changes_base, changes_base, start)

    def add_branches(model: nn.Module) -> None:
        if reads_weight or starts_from_weight or changes_base:
            _refuse_stages(model, method, names)
        wrapping.around(model)

    return Installation(freeze_base=True, add_branches=add_branches, fill_branches=wrapping.fill)


def _selected(
    sites: Sites, method: str, targets: Sequence[str] | None, exclude: Sequence[str], wraps: str
) -> list[str]:
    if wraps == "norm":
        return _named([place.name for place in sites.modules("norm")], targets, exclude)
    if wraps == "embedding" and targets is None:
        targets = [name for name, candidate in sites.candidates.items() if candidate.kind == "embedding"]
    found = sites.find(targets, exclude)
    experts = [candidate.name for candidate in found if candidate.kind == "expert"]
    if experts:
        raise ConfigError(
            f"peft (method: {method}) wraps linear layers, and {experts[0]} ({len(experts)} of {len(found)} targets) "
            f"is stacked experts; add '{experts[0].split('.')[-2]}.*' to peft.exclude, or use `type: lora`"
        )
    for candidate in found:
        if tied := sites.tied_to(candidate):
            raise ConfigError(
                f"{candidate.name} and {tied[0]} are tied (one parameter), and an adapter beside one of them would "
                f"part them; add both to peft.exclude or set model.config.tie_word_embeddings: false"
            )
    return [candidate.name for candidate in found]


def _named(names: Sequence[str], targets: Sequence[str] | None, exclude: Sequence[str]) -> list[str]:
    for pattern in (*(targets or ()), *exclude):
        if not any(matches(pattern, name) for name in names):
            raise ConfigError(f"peft: pattern {pattern!r} matches none of the norms {', '.join(names[:4])} ...")
    taken = [name for name in names if targets is None or any(matches(p, name) for p in targets)]
    taken = [name for name in taken if not any(matches(p, name) for p in exclude)]
    if not taken:
        raise ConfigError(f"peft.exclude {list(exclude)} leaves no norm of {len(names)}; remove patterns from it")
    return taken


def _peft_config(method: str, options: Mapping[str, Any], names: Sequence[str], seed: int) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = next(config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if name.value.lower() == method)
    given = dict(options)
    if "random_seed" in kind.__dataclass_fields__ and given.get("random_seed") is None:
        given["random_seed"] = seed  # else PEFT would draw places that nobody could draw again
    if method == "ia3":
        # PEFT scales what enters these, and wants no others in the list.
        given["feedforward_modules"] = _among(names, given.get("feedforward_modules") or [])
    with _in_one_line(method):
        return kind(**given, target_modules=list(names), task_type="CAUSAL_LM")


def _among(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(matches(pattern, name) for pattern in patterns)]


@contextmanager
def _in_one_line(method: str) -> Iterator[None]:
    """Say what PEFT raises about a configuration as errors of a recipe are said."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, TypeError, AttributeError, ImportError, NotImplementedError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"peft.method={method}: PEFT refuses these options for this model: {text}; change them, or peft.targets"
        ) from error


def _refuse_stages(model: nn.Module, method: str, names: Sequence[str]) -> None:
    for name in names:
        site = model.get_submodule(name)
        if isinstance(site, Site) and site.is_staged:
            techniques = " and ".join(stage.technique for stage in [*site.weight_stages(), *site.input_stages()])
            raise ConfigError(
                f"peft (method: {method}) computes from the plain weight of {name}, which {techniques} changes; add "
                f"{name!r} to one of the two excludes, or use method: lora"
            )


@dataclass
class _Wrapping:
    """One method on one model: wraps it, and fills what it wrapped."""

    method: str
    config: Any
    seed: int
    needs_weight: bool
    changes_base: bool
    start: str | None = None
    """Folder that the values come from."""
    skeleton: nn.Module | None = field(default=None, repr=False)
    """The plain model without storage, until the live one is filled."""

    def around(self, model: nn.Module) -> None:
        if any(is_branched(module) for module in model.modules()):
            raise ConfigError(
                "two techniques wrap layers with output branches, and PEFT would let the second replace the first; "
                "keep one of them, or use `type: lora` with where: weight for the other"
            )
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        if on_meta:
            self.skeleton = _without_storage(model)
        trained = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
        self._inject(model)
        if self.needs_weight:
            # What comes of the weight at the start is saved, lest another weight or library makes it differ.
            for _, layer in branched_layers(model):
                for module in branch_modules(layer):
                    module._non_persistent_buffers_set.clear()
        if self.changes_base:
            # The part that moved is in the base from now on: who loads the adapter must not move it again.
            adapter_config(model).init_lora_weights = True
        # PEFT freezes all but what it trains, parameters of stages included. What freezes of those is the
        # trainer's business: the base does (`freeze_base`), stages do not.
        for parameter in model.parameters():
            parameter.requires_grad_(trained.get(id(parameter), parameter.requires_grad))

    @torch.no_grad()
    def fill(self, live: nn.Module) -> None:
        """Give the live adapters PEFT's own start. A collective where the start depends on sharded weights."""
        assert self.skeleton is not None, "was wrapped with storage"
        twin, self.skeleton = self.skeleton, None
        tuner = self._inject(twin, live=live)
        if self.start is not None:
            load_values(tuner, self.start)
        values = {state_name(path): value for path, value, _ in branch_tensors(twin)}
        for path, tensor, _ in branch_tensors(live):
            value = values[state_name(path)]
            if value.is_meta:
                raise ConfigError(f"peft.method={self.method}: PEFT gives {path} no value; use another method")
            assign(tensor, value.to(tensor.device, tensor.dtype))
        fresh = {clean_name(path): layer for path, layer in branched_layers(twin)}
        for path, layer in branched_layers(live):
            copy_untracked(fresh[clean_name(path)], layer)

    def _inject(self, model: nn.Module, *, live: nn.Module | None = None) -> nn.Module:
        """Let PEFT wrap `model`, the live one or the copy that `live` is filled from, and return its tuner."""
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        kind = PEFT_TYPE_TO_TUNER_MAPPING[self.config.peft_type]
        lent = self._lent

        class Lending(kind):  # type: ignore[misc, valid-type]
            """The method's own tuner, whose layers have a weight while they are wrapped."""

            def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
                with lent(args[2], kwargs["current_key"], live):
                    super()._create_and_replace(*args, **kwargs)

        ignore_warning(r"Model has `tie_word_embeddings=True`|.*fan_in_fan_out is set to", UserWarning)
        on_meta = any(parameter.is_meta for parameter in model.parameters())
        with torch.random.fork_rng(devices=[]), _in_one_line(self.method):
            torch.default_generator.manual_seed(self.seed)
            tuner: nn.Module = Lending(model, copy.deepcopy(self.config), "default", low_cpu_mem_usage=on_meta)
        return tuner

    @contextmanager
    def _lent(self, module: nn.Module, name: str, live: nn.Module | None) -> Iterator[None]:
        """Let `module` have the weight that its adapter starts from, or one of the same shape, inside the context."""
        kept = dict(module._parameters)
        if self.needs_weight and live is not None:
            weight: Tensor = base_of(live.get_submodule(name)).get_parameter("weight").detach()
            own = full(weight).to("cpu", torch.float32, copy=True)
            module._parameters["weight"] = nn.Parameter(own, requires_grad=False)
        elif not self.needs_weight:
            module._parameters.update({key: _of_no_size(p) for key, p in kept.items() if p is not None and p.is_meta})
        yield
        if self.changes_base and live is not None:
            assign(weight, module.get_parameter("weight"))
        module._parameters.update(kept)


def _of_no_size(parameter: nn.Parameter) -> nn.Parameter:
    """Return zeros of the same shape in the memory of one."""
    return nn.Parameter(torch.zeros((), dtype=parameter.dtype).expand(parameter.shape), parameter.requires_grad)


def _without_storage(model: nn.Module) -> nn.Module:
    """Copy a model whose parameters have shapes alone: zeros in the memory of one."""
    memo: dict[int, Any] = {id(parameter): _of_no_size(parameter) for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def load_values(tuner: Any, folder: str) -> None:
    """Give what PEFT wrapped the values of the adapter in `folder`.

    Raises:
        ConfigError: It is of other layers or shapes, or its file cannot be read.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    held: Any = nn.Module()  # names in files are those of a `PeftModel`, which would wrap once more
    held.base_model, held.peft_config = tuner, tuner.peft_config
    trained = {name for name, parameter in held.named_parameters() if parameter.requires_grad}
    try:
        state = load_peft_weights(str(expand_user(folder)), device="cpu")
        found: Any = set_peft_model_state_dict(held, state)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(
            f"peft.path={folder} does not fit this model: {text[:300]}; set model.path to the adapter's base"
        ) from error
    missing = sorted(trained & set(found.missing_keys))
    if missing or found.unexpected_keys:
        what = f"no values for {missing[0]}" if missing else f"values for {found.unexpected_keys[0]}, not wrapped here"
        raise ConfigError(f"peft.path={folder} has {what}; give the peft.targets that it was trained with")
