"""A model on meta cut into the stages of a pipeline: what a rank keeps of it, and what stands in for the rest.

Names stay those of the whole model. At rest the model has all that this rank holds; while a stage computes it has
what that stage holds, and the family's own forward runs through it: masks and rotary positions are made from positions
on every stage, an absent block hands on what it gets, and in place of the embeddings there is what the stage before
sent.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.parallel.naming import state_parameters


class Absent(nn.Module):
    """In place of what another rank holds: returns its first argument."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `hidden`."""
        return hidden


class Received(nn.Module):
    """In place of the embeddings: returns what the stage before sent."""

    hidden: Tensor | None = None
    """[B, S, H], for the forward under way."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return `hidden`."""
        assert self.hidden is not None
        return self.hidden


def is_cut(model: nn.Module) -> bool:
    """Whether parts of `model` are on other ranks."""
    return any(isinstance(module, Absent) for module in model.modules())


@dataclass(frozen=True)
class _Place:
    """A module of the model that is on some stages only."""

    owner: nn.Module
    key: str
    module: nn.Module
    stages: frozenset[int]
    is_embedding: bool = False


class Parts:
    """The places of a causal LM by stage.

    Args:
        model: On meta, techniques in place.
        firsts: First block of each stage.

    Raises:
        ConfigError: The model has parameters that belong to no stage, or to several.
    """

    def __init__(self, model: nn.Module, firsts: Sequence[int]) -> None:
        self.num_stages = len(firsts)
        last = self.num_stages - 1
        blocks = decoder_blocks(model)
        (embedding,), behind = _around_blocks(model)
        self._received = Received()
        self._places = [_Place(*_named(model, embedding), embedding, frozenset({0}), is_embedding=True)]
        layers = _owner_of_blocks(model, blocks)
        for index, block in enumerate(blocks):
            stage = sum(first <= index for first in firsts) - 1
            self._places.append(_Place(layers, str(index), block, frozenset({stage})))
        self._places += [_Place(*_named(model, part), part, frozenset({last})) for part in behind]
        self.stage_of = self._stages_by_name(model)
        self._own: frozenset[int] = frozenset()

    def _stages_by_name(self, model: nn.Module) -> dict[str, frozenset[int]]:
        """Return which stages hold each parameter."""
        stages: dict[int, frozenset[int]] = {}
        for place in self._places:
            for parameter in place.module.parameters():
                stages[id(parameter)] = stages.get(id(parameter), frozenset()) | place.stages
        found = {}
        for name, parameter in state_parameters(model):
            found[name] = stages.get(id(parameter), frozenset())
            if not found[name] or not found[name] <= {0, self.num_stages - 1} and len(found[name]) > 1:
                raise ConfigError(
                    f"layout.pp: {name} is used on {'several stages' if found[name] else 'none of the stages'} of the "
                    f"pipeline, and each stage holds its own; set layout.pp=1, or remove the technique it is of"
                )
        return found

    def tied(self) -> list[str]:
        """Names of parameters that both the first and the last stage hold."""
        return [name for name, stages in self.stage_of.items() if len(stages) > 1]

    def keep(self, own: Collection[int]) -> None:
        """Leave in the model what the stages `own` hold."""
        self._own = frozenset(own)
        held = {id(p) for place in self._places if place.stages & self._own for p in place.module.parameters()}
        for place in self._places:
            # A tied table is found under the name of the embeddings, on the last stage too.
            is_tied = place.is_embedding and any(id(p) in held for p in place.module.parameters())
            place.owner._modules[place.key] = place.module if place.stages & self._own or is_tied else Absent()
        self._rest = [place.owner._modules[place.key] for place in self._places]

    def modules_of(self, stage: int) -> list[nn.Module]:
        """Modules that a stage of this rank computes with."""
        return [place.module for place in self._places if stage in place.stages]

    @contextmanager
    def active(self, stage: int, hidden: Tensor | None) -> Iterator[None]:
        """Let the model be one stage, given what the one before sent, [B, S, H]; None for the first."""
        self._received.hidden = hidden
        absent = Absent()
        for place in self._places:
            instead: nn.Module = self._received if place.is_embedding else absent
            place.owner._modules[place.key] = place.module if stage in place.stages else instead
        try:
            yield
        finally:
            self._received.hidden = None
            for place, module in zip(self._places, self._rest, strict=True):
                place.owner._modules[place.key] = module


def sizes(model: nn.Module) -> tuple[list[int], int, int]:
    """Return the parameters of each block, of what stands before them, and of what stands behind."""
    before, behind = _around_blocks(model)
    of_blocks = [_num_parameters([block]) for block in decoder_blocks(model)]
    return of_blocks, _num_parameters(before), _num_parameters(behind)


def _num_parameters(modules: Sequence[nn.Module]) -> int:
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def _around_blocks(model: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """Return what stands before the blocks, the embeddings, and behind: the last norm and the head.

    Raises:
        ConfigError: There is more, or less.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    body = _owner_of(model, _owner_of_blocks(model, decoder_blocks(model)))
    others = [
        child
        for child in body.children()
        if child is not embedding and not isinstance(child, nn.ModuleList) and any(True for _ in child.parameters())
    ]
    if len(others) != 1 or embedding not in body.children() or head is None:
        raise ConfigError(
            "layout.pp cuts a model of embeddings, blocks, one norm and a head, and this family has other parts "
            "around its blocks; set layout.pp=1"
        )
    return [embedding], [*others, head]


def _owner_of_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and m[0] is blocks[0])


def _owner_of(model: nn.Module, child: nn.Module) -> nn.Module:
    return _named(model, child)[0]


def _named(model: nn.Module, child: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that holds `child`, and its key there."""
    return next((m, key) for m in model.modules() for key, found in m._modules.items() if found is child)
