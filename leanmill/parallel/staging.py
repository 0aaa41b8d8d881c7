"""Staging weights once an optimizer step: on the replica that every rank holds (single, DDP)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.site import EmbeddingSite
from leanmill.core.staging import StagedOnce, Tape, run_together, staged_once
from leanmill.parallel.tensors import add_part, local


Staging = Literal["auto", "per_step", "per_use"]
LARGEST_SHARE = 1 / 8
"""Of a rank's memory that staged copies may take before `auto` does without. Where weights, gradients and AdamW
fill half of it, copies in fp32 are an eighth."""


class StepStaging(ABC):
    """The weights of a model that are staged once a step.

    `begin`, forwards and backwards, `finish`: then gradients are those of the raw weights. Between steps
    a forward without gradients stages what has changed since, under `for_evaluation`.

    Args:
        weights: Which ones.
    """

    def __init__(self, weights: Sequence[StagedOnce]) -> None:
        self.weights = tuple(weights)
        self._tapes: list[Tape] = []
        self._staged_at: list[tuple[int, ...]] = []
        """Versions of all that was staged from."""

    def begin(self) -> None:
        """Stage everything for a step."""
        self.forget()
        self._stage(has_backward=True)
        self._lend()

    def finish(self) -> None:
        """Turn what the backwards left in `grad` into gradients of raw weights and stages, and let the copies go."""
        self._take_back()
        gradients = [weight.raw.grad for weight in self.weights]
        found = [
            tape.pull_back(self._part(gradient)) if gradient is not None else None
            for tape, gradient in zip(self._tapes, gradients, strict=True)
        ]
        for weight, part in zip(self.weights, found, strict=True):
            if part is not None and part[0] is not None:
                _overwrite(self._part(weight.raw.grad), part[0])  # type: ignore[arg-type]
        self._add_own([part and part[1:] for part in found])
        self.forget()

    @contextmanager
    def for_evaluation(self) -> Iterator[None]:
        """Around a forward without gradients; what it staged serves the next one too, until something is written."""
        if self._staged_at != self._versions():
            self.forget()
            with torch.no_grad():
                self._stage(has_backward=False)
        self._lend()
        try:
            yield
        finally:
            self._take_back()
            # Afterwards: in its first forward FSDP2 makes shards that are empty anew, on the ranks that have them, and
            # all ranks must agree on whether to stage again.
            self._staged_at = self._versions()

    def forget(self) -> None:
        """Let staged weights go: something was written."""
        self._tapes, self._staged_at = [], []
        self._drop()

    def _versions(self) -> list[tuple[int, ...]]:
        """Two equal lists mean equal weights, unless somebody writes where autograd does not see it."""
        tensors = ((w.raw, *w.own, *(b for stage in w.stages for b in stage.buffers())) for w in self.weights)
        return [tuple(value for t in all_of for value in (id(t), local(t)._version)) for all_of in tensors]

    def _tape(self, weight: StagedOnce, master: Tensor, own: Sequence[Tensor], has_backward: bool) -> Tape:
        is_trained = weight.raw.requires_grad
        if has_backward and not is_trained and any(p.requires_grad for p in weight.own):
            raise RunError(
                f"{weight.sites[0].site_name} was frozen after the start while its stages train; "
                f"set engine.staging=per_use"
            )
        return Tape(weight, master, own, is_part=self._is_part, has_backward=has_backward and is_trained)

    # How engines differ.

    _is_part: bool

    @abstractmethod
    def _stage(self, *, has_backward: bool) -> None:
        """Stage every weight, leaving a tape for each."""

    @abstractmethod
    def _lend(self) -> None:
        """Let sites use what is staged."""

    @abstractmethod
    def _take_back(self) -> None:
        """Let sites stage at use again, where they can."""

    @abstractmethod
    def _drop(self) -> None:
        """Free what is staged."""

    @abstractmethod
    def _part(self, tensor: Tensor) -> Tensor:
        """This rank's part of a master or its gradient, sharing memory."""

    @abstractmethod
    def _add_own(self, gradients: Sequence[Sequence[Tensor | None] | None]) -> None:
        """Add to the gradients of the stages' own parameters, a list for each weight that has a gradient."""


class ReplicaStaging(StepStaging):
    """Whole weights, in the dtype that matmuls compute in.

    Under DDP the reducer sees the raw weights, which get the gradient of the staged ones; what follows is
    equal on all ranks, so nothing else need be reduced.

    Args:
        weights: Which ones.
        precision: `bf16` computes under autocast, which leaves tables of rows in fp32.
    """

    _is_part = False

    def __init__(self, weights: Sequence[StagedOnce], precision: Literal["fp32", "bf16"]) -> None:
        super().__init__(weights)
        self._precision = precision
        self._held: list[Tensor] = []

    def _stage(self, *, has_backward: bool) -> None:
        for weight in self.weights:
            # Of experts, what of them is here.
            tape = self._tape(weight, local(weight.raw), [local(p) for p in weight.own], has_backward)
            (staged,) = run_together([tape.staging()], _asks_nothing)
            self._tapes.append(tape)
            dtype = torch.bfloat16 if self._precision == "bf16" and not is_table(weight) else staged.dtype
            self._held.append(staged.to(dtype))

    def _lend(self) -> None:
        for weight, held in zip(self.weights, self._held, strict=True):
            for site in weight.sites:
                site.held = held

    def _take_back(self) -> None:
        for weight in self.weights:
            for site in weight.sites:
                site.held = None

    def _drop(self) -> None:
        self._held = []

    def _part(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    def _add_own(self, gradients: Sequence[Sequence[Tensor | None] | None]) -> None:
        for weight, found in zip(self.weights, gradients, strict=True):
            for parameter, gradient in zip(weight.own, found or (), strict=False):
                if gradient is not None:
                    add_part(parameter, gradient)


def is_table(weight: StagedOnce) -> bool:
    """Whether rows are looked up in the weight, which autocast leaves alone."""
    return any(isinstance(site, EmbeddingSite) for site in weight.sites)


def extra_bytes(num_weights: int, itemsize: int, *, is_table: bool, precision: str, num_shards: int | None) -> float:
    """Bytes that a rank holds more because a weight is staged once a step.

    Args:
        num_weights: Elements of the whole weight.
        itemsize: Bytes of one.
        is_table: Whether rows are looked up in it.
        precision: Compute precision.
        num_shards: Ranks that share it; None where each has all of it.
    """
    is_bf16 = precision == "bf16"
    if num_shards is not None:
        return num_weights * (2 if is_bf16 else itemsize) / num_shards
    # Of what is multiplied in bf16 autocast would hold such a copy itself.
    return 0.0 if is_bf16 and not is_table else num_weights * itemsize


def fits(num_bytes: float, memory_bytes: int) -> bool:
    """Whether staged copies of so many bytes are few for a rank with so much memory."""
    return num_bytes <= LARGEST_SHARE * memory_bytes


def choose(
    module: nn.Module,
    staging: Staging,
    *,
    precision: Literal["fp32", "bf16"],
    num_shards: int | None,
    memory_bytes: Callable[[], int],
    reason_against: Callable[[StagedOnce], str | None] = lambda weight: None,
) -> tuple[list[StagedOnce], str]:
    """Return the weights to stage once a step, and a line for the log; "" without staged weights. A collective.

    Args:
        module: The module before it is sharded; it may be on meta.
        staging: What the recipe asks for.
        precision: Compute precision.
        num_shards: Ranks that a weight is sharded over; None where each has all of it.
        memory_bytes: Asked for the memory of the smallest rank.
        reason_against: What speaks against staging a weight once, that stages allow.

    Raises:
        ConfigError: `per_step` is asked for, and a site must be staged at every use.
    """
    weights, reasons = staged_once(module, in_parts=num_shards is not None, reason_against=reason_against)
    num_staged = sum(len(weight.sites) for weight in weights) + len(reasons)
    if not num_staged:
        return [], ""
    if staging == "per_use":
        return [], f"staging: {num_staged} weights at every use, as the recipe asks"
    if reasons and staging == "per_step":
        name, reason = next(iter(reasons.items()))
        raise ConfigError(
            f"engine.staging=per_step cannot stage {name} once a step: {reason} ({len(reasons)} such weights); "
            f"set engine.staging=auto, which stages those at every use"
        )
    needed = sum(
        extra_bytes(
            local(weight.raw).numel() if num_shards is None else weight.shape.numel(),
            weight.raw.itemsize,
            is_table=is_table(weight),
            precision=precision,
            num_shards=num_shards,
        )
        for weight in weights
    )
    if staging == "auto" and weights and not fits(needed, memory := memory_bytes()):
        why = f"copies of {needed / 2**30:.2f} GiB are more than an eighth of a rank's {memory / 2**30:.2f} GiB"
        return [], f"staging: {num_staged} weights at every use, since {why}"
    line = f"staging: {num_staged - len(reasons)} weights once a step"
    why = "; ".join(dict.fromkeys(reasons.values()))
    return weights, f"{line}, {len(reasons)} at every use ({why})" if reasons else line


def _overwrite(target: Tensor, value: Tensor) -> None:
    if target.data_ptr() != value.data_ptr():
        target.copy_(value)


def _asks_nothing(questions: Sequence[object]) -> list[Tensor]:
    raise AssertionError("a whole weight answers its own questions")
