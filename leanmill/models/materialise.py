"""Giving storage and values to a model that was built on the meta device and maybe sharded since.

Values depend on the seed and on a tensor's name only. For random weights every rank computes the
whole of one module's tensors on the CPU, with a generator seeded from (seed, module name), and
keeps its share, so no rank count, engine or order of materialising changes them and nothing is
communicated. Of a checkpoint each rank reads what it holds a part of, and rank 0 what all hold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leanmill.core.around import iter_arounds
from leanmill.core.branches import branch_modules, is_branched, plain_modules, reset_branch
from leanmill.core.compact import CodedWeight, coded_weights
from leanmill.core.copies import cpu_copy
from leanmill.core.errors import RunError
from leanmill.core.names import clean_name
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot, TechniqueModule
from leanmill.models.full_copies import full_copy, own_tensor, with_storage
from leanmill.models.stored_weights import StoredWeights
from leanmill.parallel.pipeline_parts import is_cut
from leanmill.parallel.tensors import assign, full


if TYPE_CHECKING:
    from leanmill.models.config import ModelConfig


def make_materialiser(
    config: ModelConfig,
    *,
    seed: int,
    reset_branches: Callable[[nn.Module], None] | None = None,
    fill_branches: Callable[[nn.Module], None] | None = None,
) -> Callable[[nn.Module], None]:
    """Return the function an engine calls to fill a train module in place.

    It gives every parameter and buffer of the module storage and a value. Tensors still on the
    meta device are created on the CPU (plain ones) or on their mesh's device (DTensors); an engine
    that wants them elsewhere gives them storage first, keeping tied parameters one object. Plain
    tensors that were never on meta keep their value unless their module re-draws it.

    Args:
        config: The model section; a `path` loads that checkpoint, a `config` draws weights.
        seed: Seed of everything drawn.
        reset_branches: Fills a full-size copy of an adapter layer, in place; None fills them as PEFT
            does by default.
        fill_branches: Fills all adapters of a model whose base has its values, in their place; a collective.
    """

    def materialise(module: nn.Module) -> None:
        model = _causal_lm(module)
        loaded = _load(config, model) if config.path is not None else frozenset()
        _fill(module, model, seed, loaded, reset_branches, fill_branches)
        if loaded:
            _unfold_arounds(model)
        initialise_stages(model)

    return materialise


def _fill(
    module: nn.Module,
    model: nn.Module,
    seed: int,
    loaded: frozenset[int],
    reset_branches: Callable[[nn.Module], None] | None,
    fill_branches: Callable[[nn.Module], None] | None,
) -> None:
    reset = None if fill_branches is not None else reset_branches or reset_branch
    _Filler(module, model, seed, loaded, reset).fill()
    if fill_branches is not None:
        fill_branches(model)


@torch.no_grad()
def _unfold_arounds(model: nn.Module) -> None:
    """Let what stands around modules undo what an export has folded into their loaded weights. A collective."""
    for _, module, around in iter_arounds(model):
        if around.unfolds:
            own = {
                name: full(parameter.detach()).to("cpu", torch.float32) for name, parameter in module.named_parameters()
            }
            twin = cpu_copy(module, own)
            around.unfold(twin)
            for name, parameter in module.named_parameters():
                assign(parameter, twin.get_parameter(name).to(parameter.device))


@torch.no_grad()
def initialise_stages(model: nn.Module) -> None:
    """Let stages that start from the loaded weight (`Stage.initialise`) see it, one site at a time. A collective.

    A stage is given what the stages before it make of the weight, whole, in fp32, on the CPU. One that
    tied weights share sees it once.
    """
    done: set[int] = set()
    for _, site in iter_sites(model):
        stages = site.weight_stages()
        waiting = {id(stage) for stage in stages if stage.has_initialiser} - done
        if not waiting:
            continue
        done |= waiting
        weight = full(site.raw_weight.detach()).cpu()
        weight = weight.float() if site.stage(Slot.COMPACT) is None else weight
        for stage in stages:
            own = {name: full(parameter.detach()).cpu() for name, parameter in stage.named_parameters()}
            twin: Any = cpu_copy(stage, own).eval()  # what is sampled in training starts from its likeliest value
            if id(stage) in waiting:
                twin.initialise(weight)
                for name, parameter in stage.named_parameters():
                    assign(parameter, twin.get_parameter(name).to(parameter.device))
            weight = twin(weight)


def fill_added(
    model: nn.Module,
    *,
    seed: int,
    reset_branches: Callable[[nn.Module], None] | None = None,
    fill_branches: Callable[[nn.Module], None] | None = None,
) -> None:
    """Give what techniques added to a causal LM with weights of its own the values that a run would start it with.

    Args:
        model: On the CPU, not sharded.
        seed: See `make_materialiser`.
        reset_branches: See `make_materialiser`.
        fill_branches: See `make_materialiser`.
    """
    base = frozenset(id(getattr(owner, key)) for _, owner, key in _base_tensors(model))
    hidden = (buffer for _, module in plain_modules(model) for buffer in module._buffers.values())
    _fill(
        model,
        model,
        seed,
        base | {id(buffer) for buffer in hidden if buffer is not None},
        reset_branches,
        fill_branches,
    )
    _unfold_arounds(model)
    initialise_stages(model)


def draw(module: nn.Module, *, seed: int, fill_branches: Callable[[nn.Module], None] | None = None) -> None:
    """Fill a train module or causal LM with random values, whatever its weights will come from."""
    model = _causal_lm(module)
    _fill(module, model, seed, frozenset(), None, fill_branches)
    initialise_stages(model)


def _causal_lm(module: nn.Module) -> nn.Module:
    is_lm = callable(getattr(module, "_init_weights", None))
    return module if is_lm else module.model  # type: ignore[return-value]


@torch.no_grad()
def _load(config: ModelConfig, model: nn.Module) -> frozenset[int]:
    """Read the checkpoint's weights into `model`; return the ids of the tensors it filled."""
    weights = StoredWeights(config, in_parts=is_cut(model))
    filled: set[int] = set()
    coded = _coded(model)
    for name, owner, key in _base_tensors(model):
        tensor = with_storage(owner, key, model)
        if id(tensor) not in filled:
            compact = coded.get((id(owner), key))
            if compact is not None:
                filled.add(id(with_storage(compact, "scale", model)))
            weights.fill(name, tensor, compact)
            filled.add(id(tensor))
    return frozenset(filled)


def _coded(model: nn.Module) -> dict[tuple[int, str], CodedWeight]:
    """What decodes each parameter that holds codes, by its owner's id and its key."""
    return {(id(owner), key): compact for owner, key, compact in coded_weights(model)}


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (plain name, owner, key) of what a checkpoint of the plain model holds."""
    for path, module in plain_modules(model):
        for key in module._parameters:
            if module._parameters[key] is not None:
                yield clean_name(f"{path}.{key}" if path else key), module, key
        for key in module._buffers:
            if module._buffers[key] is not None and key not in module._non_persistent_buffers_set:
                yield clean_name(f"{path}.{key}" if path else key), module, key


class _Filler:
    """One pass over a module that fills whatever `loaded` does not name."""

    def __init__(
        self,
        root: nn.Module,
        model: nn.Module,
        seed: int,
        loaded: frozenset[int],
        reset_branches: Callable[[nn.Module], None] | None,
    ) -> None:
        self.root, self.model, self.seed = root, model, seed
        self.done = set(loaded)
        self.reset_branches = reset_branches
        self.coded = _coded(model)

    @torch.no_grad()
    def fill(self) -> None:
        prefix = next((f"{path}." for path, m in self.root.named_modules() if m is self.model and path), "")
        initialisers = self._initialisers()
        visited: set[int] = set()
        for path, module in self.root.named_modules():
            if id(module) in visited:
                continue
            name = clean_name(path.removeprefix(prefix))
            if isinstance(module, TechniqueModule):
                visited.update(id(m) for m in module.modules())
                self._draw(name, list(module.modules()), module, lambda full: full.reset_parameters())
            elif is_branched(module):
                branches = branch_modules(module)
                visited.update(id(m) for m in branches)
                if self.reset_branches is None:
                    self._give_storage([module, *branches])
                else:
                    self._draw(f"{name}.branches", [module, *branches], module, self.reset_branches)
            elif module._parameters or module._buffers:
                self._draw(name, [module], module, initialisers.get(id(module), _no_initialiser))
        self._check()

    def _give_storage(self, members: list[nn.Module]) -> None:
        """For tensors whose values come later."""
        for module in members:
            for key in (*module._parameters, *module._buffers):
                if own_tensor(module, key) is not None:
                    self.done.add(id(with_storage(module, key, self.root)))

    def _initialisers(self) -> dict[int, Callable[[Any], None]]:
        """By module id: transformers initialises a module through the innermost model that holds it."""
        found: dict[int, Callable[[Any], None]] = {}
        for owner in self.model.modules():  # outer models come first
            if callable(getattr(owner, "_init_weights", None)):
                found |= {id(module): owner._init_weights for module in owner.modules()}  # type: ignore[misc]
        return found

    def _draw(self, name: str, members: list[nn.Module], top: nn.Module, reset: Callable[[Any], None]) -> None:
        """Fill the own tensors of `members` by running `reset` on a full-size CPU copy of `top`."""
        targets = [(m, key) for m in members for key in (*m._parameters, *m._buffers) if own_tensor(m, key) is not None]
        if all(id(own_tensor(m, key)) in self.done for m, key in targets):
            return
        full, copies = full_copy(top, members, self.coded)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would reseed accelerators too.
            torch.default_generator.manual_seed(_seed_of(self.seed, name))
            reset(full)
        for module, key in targets:
            if id(own_tensor(module, key)) in self.done:
                continue
            value = own_tensor(copies[id(module)], key)
            tensor = with_storage(module, key, self.root)
            assert value is not None
            if value.is_floating_point() and value.isnan().any():
                raise RunError(f"{name}: nothing gives {key!r} a value; its module must initialise it")
            compact = self.coded.get((id(module), key))
            if compact is None:
                assign(tensor, value)
            else:
                self.done.add(id(with_storage(compact, "scale", self.root)))
                compact.assign_encoded(tensor, value, assign)
            self.done.add(id(tensor))

    def _check(self) -> None:
        named = (*self.root.named_parameters(), *self.root.named_buffers())
        left = [name for name, tensor in named if tensor.is_meta]
        if left:
            raise RunError(f"{len(left)} tensors were left without storage: {', '.join(left[:5])}")
        tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        by_name = {clean_name(n): p for n, p in self.model.named_parameters(remove_duplicate=False)}
        for target, source in tied.items():
            if target in by_name and source in by_name and by_name[target] is not by_name[source]:
                raise RunError(f"{target} and {source} are tied in the config but came apart while sharding")


def _no_initialiser(module: nn.Module) -> None:
    """For modules outside the causal LM: leaves the blanks that `_draw` reports."""


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
