"""What watches a run. Observers never change the maths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from leanmill.parallel.engine import Engine
    from leanmill.recipe.root import Recipe


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Facts known before step 0. Observers run on rank 0 unless they say otherwise."""

    recipe: Recipe
    run_dir: Path
    engine: Engine
    rank: int
    world_size: int
    num_steps: int
    start_step: int
    num_parameters: int
    """Of the plain model, tied weights once, unsharded."""
    num_trainable: int
    flops_per_token: float
    """Training FLOPs (forward and backward) of one token, active parameters only, see `flops.py`; and the forward of
    frozen models, such as a teacher."""
    epochs: float | None = None
    """Passes over the training data that the whole run is; None where the data is a stream."""
    notes: tuple[str, ...] = ()
    """Lines worth showing at start: engine choice, sites converted, data, resume."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, already reduced over ranks; plain Python numbers."""

    step: int
    """1-based count of finished steps."""
    tokens: int
    """Tokens consumed since the start of the run, over all ranks."""
    losses: Mapping[str, float]
    """Means: `total` (the whole objective), `cross_entropy` and one key a loss term, per valid token; one key a
    loss inside the model, `name/place` where it has several, with their mean as `name`."""
    grad_norm: float
    lr: float
    step_seconds: float
    """Mean wall time of the steps since the last record."""
    tokens_per_second: float
    """Over all ranks."""
    peak_memory_bytes: int
    """Device memory peak on CUDA, resident set on CPU; maximum over ranks."""
    skipped_steps: int
    """Optimizer steps skipped so far for non-finite values."""
    epoch: float | None = None
    """Passes over the training data so far; None where the data is a stream."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What step rules report, as `rule/metric`."""


@dataclass(frozen=True, kw_only=True)
class DomainScore:
    """Held-out result of one domain."""

    loss: float
    """Nats per token, or of vectors of texts per pair."""
    perplexity: float | None
    """None of vectors of texts, as what follows."""
    bits_per_byte: float | None
    order0_bits_per_byte: float | None
    """Entropy of single bytes in the same text: what a byte-frequency table reaches."""
    num_tokens: int
    """Of vectors of texts, pairs."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what the model adds to it."""

    prompt: str
    text: str
    """Without the prompt, special tokens left out."""


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation."""

    step: int
    tokens: int
    domains: Mapping[str, DomainScore]
    """By domain, and `all` (token-weighted)."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What probes report, as `probe/metric`."""
    tables: Mapping[str, Any] = field(default_factory=dict)
    """What probes counted, by probe; JSON-able."""
    notes: tuple[str, ...] = ()
    """What probes could not say, and why."""
    samples: tuple[Sample, ...] = ()
    """What the model adds to the recipe's prompts."""


class Observer:
    """Base with empty hooks; every hook is called on every rank, in list order."""

    def on_start(self, info: RunInfo) -> None:
        """Before the first step (or the first after a resume)."""

    def on_step(self, record: StepRecord) -> None:
        """Every `log.every_steps` steps and after the last."""

    def on_eval(self, record: EvalRecord) -> None:
        """After an evaluation."""

    def on_checkpoint(self, step: int, path: Path, seconds_stalled: float) -> None:
        """After a save returned to the loop."""

    def on_end(self, status: str, message: str = "") -> None:
        """Once: `status` is `finished`, `stopped` or `failed`, or `rewound` where it goes on from an earlier step."""
