"""Where a loss or gradient that is not finite came from: the step once more, with an eye on every module.

The update was not applied, so the second pass sees the weights that the first one saw; where the loop learns of it
late (CUDA, whose flag is read with the records), those of the step it learns it in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.parallel.collectives import gather_objects
from leanmill.parallel.engine import Engine
from leanmill.parallel.naming import state_parameters
from leanmill.parallel.tensors import local


_NUM_NAMED = 4
"""Ranks, and rows, that are named."""


@dataclass
class _Watch:
    """What the hooks of one rank have seen."""

    row_ids: Sequence[Tensor | None]
    """Of each micro-batch."""
    micro_batch: int = -1
    found: dict[str, Any] | None = None
    names: dict[int, str] = field(default_factory=dict)

    def next_batch(self, module: nn.Module, args: Any) -> None:
        # Stages of a pipeline take micro-batches by turns, so which one it is its rows say, where they are known.
        ids = args[0].get("row_ids") if args else None
        known = [index for index, own in enumerate(self.row_ids) if own is not None and own is ids]
        self.micro_batch = known[0] if known else self.micro_batch + 1

    def look(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the first module that gives what is not finite: an inner one ends before those around it."""
        if self.found is not None or not (bad := [tensor for tensor in _floats(output) if not _is_finite(tensor)]):
            return
        own = [name for name, p in module.named_parameters(recurse=False) if not _is_finite(local(p.detach()))]
        self.found = {
            "module": self.names[id(module)],
            "weight": own[0] if own else None,
            "input_is_finite": all(_is_finite(tensor) for tensor in _floats(args)),
            "micro_batch": self.micro_batch,
            "rows": self._rows(bad[0]),
        }

    def _rows(self, output: Tensor) -> list[int]:
        """Rows of the data whose values are not finite, where the output has one entry a row."""
        ids = self.row_ids[self.micro_batch] if 0 <= self.micro_batch < len(self.row_ids) else None
        if ids is None or output.dim() < 2 or len(output) != len(ids):
            return []
        bad = ~torch.isfinite(output.detach()).flatten(1).all(1)
        return [int(row) for row in ids[bad.to(ids.device)]]


def source_of(engine: Engine, micro_batches: Sequence[Batch], num_valid_tokens: Tensor) -> str:
    """Say which module first gives values that are not finite, on which rank and for which rows. A collective.

    Where the forward is finite, the losses and then the gradients are looked at, from the output backwards.
    Gradients are dropped afterwards.

    Args:
        engine: Between two steps.
        micro_batches: This rank's, as `Engine.forward_backward` takes them; seeds are to be set before.
        num_valid_tokens: As there.
    """
    model: nn.Module = engine.module.model  # type: ignore[assignment]
    watch = _Watch([batch.get("row_ids") for batch in micro_batches])
    with _watching(engine.module, model, watch), torch.enable_grad():
        losses = engine.forward_backward(micro_batches, num_valid_tokens)
    here: dict[str, Any] = {"forward": watch.found, "losses": [n for n, v in losses.items() if not _is_finite(v)]}
    here["gradient"] = None if watch.found or here["losses"] else _first_bad_gradient(engine, model)
    engine.step(torch.ones((), dtype=torch.bool, device=engine.device))
    return described(gather_objects(here))


@contextmanager
def _watching(module: nn.Module, model: nn.Module, watch: _Watch) -> Iterator[None]:
    watch.names = {id(part): clean_name(name) or "the model" for name, part in model.named_modules()}
    handles = [module.register_forward_pre_hook(watch.next_batch)]
    handles += [part.register_forward_hook(watch.look) for part in model.modules()]
    # A compiled block was traced without hooks.
    torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        torch.compiler.set_stance("default")
        for handle in handles:
            handle.remove()


def _first_bad_gradient(engine: Engine, model: nn.Module) -> str | None:
    """The parameter nearest to the output whose gradient is not finite, by this rank's pieces."""
    trained = [(name, p) for name, p in state_parameters(model) if p.requires_grad]
    for name, parameter in reversed(trained):
        try:
            gradient = engine.views.of(parameter).grad
        except ConfigError:
            continue  # experts that ranks move among themselves; of the rest there is something to say
        if gradient is not None and not _is_finite(gradient):
            return name
    return None


def described(ranks: Sequence[Mapping[str, Any]]) -> str:
    """Put what ranks found into a sentence's end.

    Args:
        ranks: By rank: `forward`, `losses` and `gradient`.
    """
    forward = [(rank, found["forward"]) for rank, found in enumerate(ranks) if found["forward"]]
    if forward:
        lines = [_forward(rank, found) for rank, found in forward[:_NUM_NAMED]]
        more = len(forward) - _NUM_NAMED
        return "first " + "; ".join(lines) + (f"; and on {more} more ranks" if more > 0 else "")
    if losses := sorted({name for found in ranks for name in found["losses"] if name != "total"}):
        return f"the model's forward is finite, the loss {losses[0]} is not"
    if gradients := [found["gradient"] for found in ranks if found["gradient"]]:
        return f"the forward is finite; of gradients the first that is not, from the output, is that of {gradients[0]}"
    return (
        "a second pass over the same rows is finite: a matter of the moment, such as a fault of the hardware or an "
        "operation that is not deterministic"
    )


def _forward(rank: int, found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    where = f"rank {rank}, micro-batch {found['micro_batch'] + 1}"
    if rows:
        named = ", ".join(map(str, rows[:_NUM_NAMED])) + (", ..." if len(rows) > _NUM_NAMED else "")
        where += f", rows {named} of the data"
    if found["weight"] is not None:
        return f"in {found['module']}, whose {found['weight']} is not finite itself ({where})"
    if not found["input_is_finite"]:
        return f"in what {found['module']} is given ({where})"
    return f"in {found['module']}, whose input is finite ({where})"


def _floats(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())
