"""What a technique is: a validated configuration that installs stages, loss terms and step rules.

A technique never sees the trainer. It gets the model's sites and an `InstallContext`, and hands
back an `Installation`. The configuration is frozen, so whatever a technique builds lives in the
modules it installed or in the terms and rules it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pydantic import Field

from leanmill.core.config import Config


if TYPE_CHECKING:
    from torch import Tensor, nn

    from leanmill.core.sites import Sites

Batch = Mapping[str, "Tensor"]
"""One micro-batch on its device: `input_ids` [B, S] int64, `labels` [B, S] int64 (already shifted:
`labels[b, t]` is the target of position t, -100 where there is none), `position_ids` [B, S] int64
(restarting at 0 in each document)."""


@dataclass(frozen=True, kw_only=True)
class StepContext:
    """What a step rule may know about the optimizer step it runs in."""

    step: int
    """Index of the optimizer step, from 0."""
    num_steps: int
    """Optimizer steps of the whole run."""
    num_micro_batches: int
    """Backward passes that this rank adds up in this step."""


class LossTerm(Protocol):
    """A per-token loss added to the training loss.

    The trainer calls `prepare` once a micro-batch, without gradients and outside the model's
    forward, then the term itself once for each chunk of tokens, so that logits of shape
    [tokens, vocabulary] never exist as a whole.
    """

    name: str
    weight: float

    def prepare(self, batch: Batch) -> Mapping[str, Tensor]:
        """Return extra tensors [B, S, ...] that the term needs; chunked along with the tokens."""
        ...

    def __call__(self, logits: Tensor, labels: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
        """Return the fp32 sum of the loss over tokens whose label is not -100.

        Args:
            logits: Student logits [N, V], any float dtype.
            labels: Targets [N] int64, -100 where ignored.
            extras: What `prepare` returned, flattened to [N, ...] and cut like the tokens.
        """
        ...


@runtime_checkable
class HeadLossTerm(LossTerm, Protocol):
    """A term that can also be had straight from the head's operands, beside cross-entropy.

    A trainer prefers this where it applies (a plain head, no other terms): no logits of the whole
    micro-batch exist, and both losses come from the same ones.
    """

    def with_cross_entropy(
        self,
        head: tuple[Tensor, Tensor, Tensor | None],
        labels: Tensor,
        extras: Mapping[str, Tensor],
        *,
        cross_entropy_weight: float,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the weighted total, which alone carries gradients, cross-entropy, and the term: sums.

        Args:
            head: Student hidden states [N, H], head weight [V, H] and bias [V].
            labels: Targets [N] int64, -100 where ignored.
            extras: What `prepare` returned, flattened to [N, ...].
            cross_entropy_weight: Weight of cross-entropy in the total, beside the term's own.
            chunk_tokens: Tokens whose logits may exist at once; None chooses by memory.
        """
        ...


class StepRule:
    """Work done exactly once an optimizer step, under no_grad, on every rank.

    Rules write tensors (never Python numbers that a compiled block would specialise on) and walk
    live modules (never cached parameters, which sharding replaces).
    """

    def begin_step(self, context: StepContext) -> None:
        """Run before the first forward of the step: write schedules into buffers."""

    def before_optimizer(self, context: StepContext) -> None:
        """Run after the last backward and before clipping."""

    def after_optimizer(self, context: StepContext) -> None:
        """Run after the optimizer has written the weights."""


@dataclass(frozen=True, kw_only=True)
class InstallContext:
    """What the trainer offers a technique at installation."""

    load_frozen_model: Callable[[str], nn.Module]
    """Load a causal LM from a folder or hub name, frozen, in eval mode, ready on the run's device
    (sharded when the engine shards). Call it lazily: it is valid only once training starts."""
    vocab_size: int
    """Rows of the student's embedding."""
    tokenizer_fingerprint: str | None = None
    """Digest of the student's tokenizer, where there is one."""
    fingerprint_of_tokenizer: Callable[[str], str | None] | None = None
    """Digest of the tokenizer in a folder or hub repository, comparable with the above; None where
    there is none."""


@dataclass(frozen=True, kw_only=True)
class Installation:
    """What a technique put in place."""

    loss_terms: Sequence[LossTerm] = ()
    step_rules: Sequence[StepRule] = ()
    freeze_base: bool = False
    """Train only the parameters that stages and branches added."""
    add_branches: Callable[[nn.Module], None] | None = None
    """Called with the model after every technique has put its stages: wraps sites with output
    branches (adapters). Wrapping last keeps the result independent of the listed order."""
    reset_branch: Callable[[nn.Module], None] | None = None
    """Fills the parameters of one layer that `add_branches` wrapped, once they have been materialised
    from meta; called with the random generator seeded for this layer, on full tensors."""


class TechniqueConfig(Config):
    """Base of every technique's configuration; subclasses add `type: Literal["name"]`."""

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """Put stages on the sites of a model whose weights may still be on the meta device."""
        raise NotImplementedError

    def frozen_models(self) -> Mapping[str, str]:
        """Return the models that the technique reads: key of this configuration -> folder or hub name."""
        return {}


class WeightTechniqueConfig(TechniqueConfig):
    """Base of techniques that take weights by pattern."""

    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear and expert weight except the head."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""


@runtime_checkable
class Technique(Protocol):
    """The protocol the trainer programs against."""

    type: str

    def install(self, sites: Sites, context: InstallContext) -> Installation:
        """See `TechniqueConfig.install`."""
        ...


@dataclass
class InstalledTechniques:
    """All techniques of a run, merged in the listed order."""

    loss_terms: list[LossTerm] = field(default_factory=list)
    step_rules: list[StepRule] = field(default_factory=list)
    freeze_base: bool = False
    reset_branch: Callable[[nn.Module], None] | None = None
