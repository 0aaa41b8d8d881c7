"""A tensor-parallel plan for families that transformers has none for, derived from what depends on what.

As in Redco (arXiv:2310.16355) matmuls pair up along the dataflow: one by rows, then one by columns. Which rows of the
first a rank needs is not guessed from names, but seen: in a forward of a few tokens, with random numbers in the place
of what the matmuls give, they are those that the rank's columns of the second depend on. That cuts fused projections by
heads inside each of queries, keys and values, wherever a family keeps them. Families count heads and widths in
attributes of their own; those that a rank must have its part of are the fewest with which it computes, bit for bit but
for rounding, its part of what all compute together. What passes no such test is refused.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.branches import base_of, branched_layers
from leanmill.core.errors import ConfigError


_NUM_TOKENS = 5
_MOST_COUNTS = 8
_WIDTHS_OF_ONE_HEAD = ("head_dim", "head_size", "rotary")


@dataclass(frozen=True)
class Pair:
    """Matmuls of one module that ranks share: some by rows, whose results meet in one by columns."""

    owner: str
    """Path of the module."""
    by_rows: Mapping[str, tuple[tuple[int, ...], ...]]
    """Path -> for every rank the rows that it needs."""
    by_columns: str
    counts: Mapping[str, int]
    """Attributes of the owner, and what they are on a rank."""


class Underivable(ConfigError):
    """Ranks cannot share the matmuls of this model by a rule that is known here."""


def derived_pairs(model: nn.Module, tp: int) -> list[Pair]:
    """Return the pairs of matmuls in decoder blocks that `tp` ranks can share.

    Args:
        model: The causal LM; its values are not used, it may be on meta.
        tp: Ranks.

    Raises:
        Underivable: There are none, or what lies between them is more than a rank can compute on its own.
    """
    stand_in = _StandIn(model)
    try:
        calls = stand_in.run()
    except Exception as error:  # of whatever a family's own code raises
        raise Underivable(f"it cannot be run without its values ({str(error).splitlines()[0][:120]})") from error
    known: tuple[str, ...] = ()
    pairs = []
    for owner, linears in stand_in.owners():
        pair = _Search(stand_in, calls, owner, linears, tp).pair(known)
        known = tuple(pair.counts) or known
        pairs.append(pair)
    if not pairs:
        raise Underivable("its blocks have no linear layers")
    return pairs


class _StandIn:
    """A copy of a model whose matmuls and tables give random numbers, so that they need no values."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = copy.deepcopy(model).to(torch.float64).eval()
        for path, layer in list(branched_layers(self.model)):
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, base_of(layer))
        self.linears = {path: m for path, m in self.model.named_modules() if isinstance(m, nn.Linear)}
        self.given: dict[str, Tensor] = {}
        """What a layer gives, by path, where it has been drawn or set."""
        self.entered: dict[str, Tensor] = {}
        """What it was last given."""
        self._generator = torch.Generator().manual_seed(0)
        for path, module in self.model.named_modules():
            self._fill(module)
            if isinstance(module, nn.Linear):
                vars(module)["forward"] = self._linear(path, module)
            elif isinstance(module, nn.Embedding):
                vars(module)["forward"] = self._table(module)

    def owners(self) -> Iterator[tuple[str, list[str]]]:
        """Yield (path of a module in a block, paths of the linear layers that it holds itself)."""
        path_of = {id(module): path for path, module in self.model.named_modules()}
        for block in decoder_blocks(self.model):
            inside = [path for path in self.linears if path.startswith(f"{path_of[id(block)]}.")]
            for owner in dict.fromkeys(path.rpartition(".")[0] for path in inside):
                yield owner, [path for path in inside if path.rpartition(".")[0] == owner]

    @torch.no_grad()
    def run(self) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
        """Run all of it; return what owners were called with."""
        calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        handles = []
        for owner, _ in self.owners():

            def note(module: nn.Module, args: Any, kwargs: Any, owner: str = owner) -> None:
                calls[owner] = (args, kwargs)

            module = self.model.get_submodule(owner)
            handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        positions = torch.arange(_NUM_TOKENS)[None]
        try:
            self.model(input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self.given.clear()
        return calls

    def _linear(self, path: str, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(tokens: Tensor) -> Tensor:
            self.entered[path] = tokens
            if path not in self.given:
                self.given[path] = self._drawn((*tokens.shape[:-1], module.out_features))
            return self.given[path]

        return forward

    def _table(self, module: nn.Embedding) -> Callable[..., Tensor]:
        return lambda ids, *args, **kwargs: self._drawn((*ids.shape, module.embedding_dim))

    def _fill(self, module: nn.Module) -> None:
        is_big = isinstance(module, nn.Linear | nn.Embedding)
        for key, parameter in module._parameters.items():
            if parameter is not None and not is_big:
                module._parameters[key] = nn.Parameter(self._drawn(parameter.shape))
        for key, buffer in module._buffers.items():
            if buffer is not None:
                drawn = self._drawn(buffer.shape) if buffer.is_floating_point() else torch.ones(buffer.shape)
                module._buffers[key] = drawn.to(buffer.dtype)

    def _drawn(self, shape: Sequence[int]) -> Tensor:
        """Of one sign, so that no activation function is flat there."""
        return torch.rand(tuple(shape), generator=self._generator, dtype=torch.float64) * 0.5 + 0.1


class _Search:
    """Finds the pair of one owner."""

    def __init__(self, stand_in: _StandIn, calls: Mapping[str, Any], owner: str, linears: list[str], tp: int) -> None:
        self._stand_in, self._owner, self._linears, self._tp = stand_in, owner, linears, tp
        self._module = stand_in.model.get_submodule(owner)
        if owner not in calls:
            raise Underivable(f"{owner} is not called in a forward")
        self._args, self._kwargs = calls[owner]

    def pair(self, known: tuple[str, ...]) -> Pair:
        """Return it; `known` are names of counts that another owner needed."""
        given = self._run({})
        last = self._last(given)
        entered, first = self._stand_in.entered[last], [path for path in self._linears if path != last]
        self._check_numbers_between(entered)
        self._check_dropout(given, last)
        rows = {path: self._rows(entered, given, path) for path in first}
        return Pair(self._owner, rows, last, self._counts(known, rows, last, given, entered.detach()))

    def _run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Call the owner, its layers giving `given`, or numbers drawn anew; return what they gave."""
        self._stand_in.given = {path: value.detach().requires_grad_() for path, value in given.items()}
        if not given:
            # Drawn once without a graph, since that needs their shapes.
            with torch.no_grad():
                self._module(*self._args, **self._kwargs)
            return self._run({path: self._stand_in.given[path] for path in self._linears})
        self._module(*self._args, **self._kwargs)
        return dict(self._stand_in.given)

    def _last(self, given: Mapping[str, Tensor]) -> str:
        """Return the one layer whose input depends on the other layers', and that on no other's."""
        feeds = {
            path: {other for other in self._linears if other != path and self._gradient(path, given[other]) is not None}
            for path in self._linears
        }
        last = [path for path, sources in feeds.items() if sources]
        if len(last) != 1 or feeds[last[0]] != set(self._linears) - set(last):
            raise Underivable(f"the linear layers of {self._owner} are not some whose results meet in one")
        return last[0]

    def _gradient(self, path: str, source: Tensor, columns: slice = slice(None)) -> Tensor | None:
        entered = self._stand_in.entered[path]
        if not entered.requires_grad:
            return None
        weights = torch.linspace(0.5, 1.5, entered[..., columns].numel(), dtype=entered.dtype)
        total = (entered[..., columns].reshape(-1) * weights).sum()
        return torch.autograd.grad(total, source, allow_unused=True, retain_graph=True)[0]

    def _check_numbers_between(self, entered: Tensor) -> None:
        """Refuse parameters between the pair: ranks would have parts of some and all of others."""
        own = {name: p for name, p in self._module.named_parameters() if not p.is_meta}
        if own:
            found = torch.autograd.grad(entered.sum(), list(own.values()), allow_unused=True, retain_graph=True)
            for name, gradient in zip(own, found, strict=True):
                if gradient is not None:
                    raise Underivable(f"{self._owner}.{name} lies between its matmuls, and is shared in no known way")

    @torch.no_grad()
    def _check_dropout(self, given: Mapping[str, Tensor], last: str) -> None:
        """Refuse what is drawn between the pair: ranks would draw the same for different numbers."""
        entered = self._stand_in.entered[last]
        self._stand_in.given = dict(given)
        self._module.train()
        self._module(*self._args, **self._kwargs)
        self._module.eval()
        if not torch.equal(self._stand_in.entered[last], entered):
            raise Underivable(f"{self._owner} draws dropout between its matmuls; set it to 0 in model.config")
        self._stand_in.entered[last] = entered

    def _rows(self, entered: Tensor, given: Mapping[str, Tensor], path: str) -> tuple[tuple[int, ...], ...]:
        """Return the rows of a layer that each rank's columns of the last one depend on."""
        last, size = self._last(given), entered.shape[-1] // self._tp
        if entered.shape[-1] % self._tp:
            raise Underivable(f"{self._tp} ranks do not divide the {entered.shape[-1]} inputs of {last}")
        found = []
        for rank in range(self._tp):
            gradient = self._gradient(last, given[path], slice(rank * size, (rank + 1) * size))
            assert gradient is not None
            needed = (gradient.flatten(0, -2).abs() > 0).any(0)
            found.append(tuple(needed.nonzero().flatten().tolist()))
        rows = sorted(itertools.chain.from_iterable(found))
        if rows != list(range(given[path].shape[-1])) or len({len(one) for one in found}) != 1:
            raise Underivable(f"{self._tp} ranks would need the same rows of {path}: its heads do not divide")
        return tuple(found)

    def _counts(
        self,
        known: tuple[str, ...],
        rows: Mapping[str, tuple[tuple[int, ...], ...]],
        last: str,
        given: Mapping[str, Tensor],
        entered: Tensor,
    ) -> dict[str, int]:
        """Return the fewest attributes of the owner with whose parts every rank computes its own columns."""
        numbers = {
            name: value
            for name, value in vars(self._module).items()
            if type(value) is int and value > 1 and value % self._tp == 0
            if not any(part in name for part in _WIDTHS_OF_ONE_HEAD)
        }
        names = list(numbers)[:_MOST_COUNTS]
        subsets = itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1))
        first = [known] if known and set(known) <= set(names) else []
        for subset in [*first, *subsets]:
            counts = {name: numbers[name] // self._tp for name in subset}
            if all(self._holds(counts, rank, rows, last, given, entered) for rank in range(self._tp)):
                # What another owner needed may be more than this one does.
                return counts if subset != known or not self._holds_without(rows, last, given, entered) else {}
        raise Underivable(f"no count in {self._owner} makes a rank compute with its heads what all do together")

    def _holds_without(self, rows: Any, last: str, given: Any, entered: Tensor) -> bool:
        return all(self._holds({}, rank, rows, last, given, entered) for rank in range(self._tp))

    @torch.no_grad()
    def _holds(
        self,
        counts: Mapping[str, int],
        rank: int,
        rows: Mapping[str, tuple[tuple[int, ...], ...]],
        last: str,
        given: Mapping[str, Tensor],
        entered: Tensor,
    ) -> bool:
        before = {name: getattr(self._module, name) for name in counts}
        part = {path: given[path][..., list(rows[path][rank])] for path in rows}
        self._stand_in.given = {**given, **part}
        try:
            vars(self._module).update(counts)
            self._module(*self._args, **self._kwargs)
        except (RuntimeError, ValueError, IndexError):
            return False
        finally:
            vars(self._module).update(before)
        found, size = self._stand_in.entered[last], entered.shape[-1] // self._tp
        wanted = entered[..., rank * size : (rank + 1) * size]
        return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-6, atol=1e-9)


def in_line(rows: tuple[tuple[int, ...], ...]) -> bool:
    """Whether every rank needs the rows behind those of the rank before."""
    return list(itertools.chain.from_iterable(rows)) == list(range(sum(map(len, rows))))
