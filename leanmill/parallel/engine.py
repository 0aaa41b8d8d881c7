"""The protocol every engine fulfils. The trainer programs against this and nothing below it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.ledger import ledger_of
from leanmill.core.views import Views
from leanmill.parallel.layout import Layout


Losses = dict[str, Tensor]
"""fp32 scalars: `total` (what is differentiated: weighted sum over tokens) and one raw sum a term."""
Wanted = Literal["losses", "token_losses", "next_logits", "embeddings", "hidden_states"]
"""What a forward is to give: `Losses`; `hidden_states` [B, S, H] behind the last block and norm; or, without
gradients, `cross_entropy` [B, S] of each token, fp32, alone; of a batch with `last` [B] int64, positions whose
following token is asked for, `logits` [B, V]; or, of rows of texts, `embeddings` [B, texts, H]."""


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What the trainer hands an engine to bring a module from meta to trainable."""

    materialise: Callable[[nn.Module], None]
    """Give storage and values to every parameter and buffer of the (maybe already sharded) module,
    in place. Plain tensors and DTensors both; values do not depend on the number of ranks."""
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    """Build the optimizer over the module's trainable parameters as they are now."""
    num_micro_batches: int
    """Backward passes of a step; constant over the run."""
    max_grad_norm: float | None
    """Clipping threshold, also given to `clip`; DeepSpeed wants it at initialisation."""


class Engine(ABC):
    """Owns the module, its sharding, the optimizer and the order of forward, backward and step.

    The module is a *train module*: `module(batch) -> Losses`, un-normalised sums over tokens, or what is
    `wanted` instead; its attribute `model` is the causal LM. Every method is called by all ranks together.
    """

    name: str
    device: torch.device
    data_rank: int
    """Which share of the data this process reads, in [0, data_size)."""
    data_size: int
    reduced_size: int
    """Ranks over which gradients are means: all that compute tokens of their own, or those of one worker."""
    layout: Layout
    """How the ranks share the work."""
    module: nn.Module
    """The train module, live (after sharding; not the DDP or DeepSpeed wrapper)."""
    waits_between: bool = True
    """Whether a rank waits for each collective of forward and backward before it asks for the next."""
    notes: tuple[str, ...] = ()
    """Lines on what `prepare` decided, for the log."""

    @abstractmethod
    def prepare(self, module: nn.Module, preparation: Preparation) -> None:
        """Shard, materialise and build the optimizer, in the order this engine needs."""

    @abstractmethod
    def forward_backward(self, micro_batches: Sequence[Batch], num_valid_tokens: Tensor) -> Losses:
        """Accumulate gradients of sum(total) / num_valid_tokens over all micro-batches of all ranks.

        Those of losses on the module's ledger come along, see `leanmill.core.ledger.Per`.

        Args:
            micro_batches: This rank's micro-batches, on its device; as many on every rank.
            num_valid_tokens: Targets of all ranks that step together, fp32 scalar, equal on all of them.

        Returns:
            Losses summed over this rank's micro-batches (not over ranks that read other data), detached.
        """

    def _begin_backward(self, micro_batches: Sequence[Batch], num_valid_tokens: Tensor) -> Tensor:
        """Return what a sum over tokens is multiplied with before backward, and let losses in the model begin a step.

        Reductions over ranks average, so what is to be summed is scaled up by their number.
        """
        scale = self.reduced_size / num_valid_tokens
        ledger = ledger_of(self.module)
        if ledger is not None:
            ledger.begin_step(token_scale=scale, num_micro_batches=len(micro_batches))
            ledger.see_step(micro_batches, self._look)
        return scale

    @abstractmethod
    def _look(self, batch: Batch) -> None:
        """Run a forward in training mode; called without gradients, for what it leaves in the modules."""

    @abstractmethod
    def clip(self, max_norm: float | None) -> Tensor:
        """Clip by the global norm; return the norm before clipping, fp32 scalar, equal on all ranks.

        None only measures. DeepSpeed clips inside its step; then this measures.
        """

    @abstractmethod
    def step(self, skip: Tensor) -> None:
        """Step the optimizer and zero the gradients.

        Args:
            skip: Bool scalar, equal on all ranks: where true, weights and optimizer state stay as
                they are and only the gradients are dropped.
        """

    @abstractmethod
    def set_trainable(self, names: Collection[str]) -> None:
        """Train exactly these parameters of `module.model` from the next step on; called between steps.

        Gradients and optimizer state of the others are freed; one that trains again starts from fresh
        state. Costs nothing where the set is what it was.

        Args:
            names: As in `model_state`, equal on all ranks; parameters that trained when the optimizer was made.

        Raises:
            ConfigError: This engine trains a fixed set.
        """

    @abstractmethod
    def evaluate(self, batch: Batch, *, wanted: Wanted = "losses") -> Losses:
        """Forward without gradients, module in eval mode around the call; this rank's sums, or what is `wanted`."""

    @property
    @abstractmethod
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose `lr` a schedule writes before `step`."""

    @property
    @abstractmethod
    def views(self) -> Views:
        """This rank's pieces of weights, gradients and optimizer state, for step rules."""

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full gradient) between backward and step, for tests: it gathers them. Rules use `views`."""

    @abstractmethod
    def full_parameter(self, name: str) -> Tensor:
        """Gather one parameter of `module.model` by its dotted name; the ranks that have it call together.

        Full, fp32 master where there is one, on each of them, on the CPU.
        """

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers of `module.model` by name (no wrapper components).

        DTensor where sharded, plain where replicated. Suits distributed checkpointing. DeepSpeed,
        whose own partitions are flat, hands out fp32 copies as DTensors on the CPU.
        """

    @abstractmethod
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Write what `model_state` returned (after a checkpoint was read into it)."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """Flat `"<parameter name>/<state key>"` -> tensor (DTensor where sharded); `step` included.

        Parameters that train but have no state yet get the one they would start from (zero moments and
        counters), so it can be loaded into; no weight changes.
        """

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Write what `optimizer_state` returned (after a checkpoint was read into it)."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must know of how this engine has placed things: JSON-able, equal on all ranks.

        A collective. Another engine, or another number of ranks, may ignore it.
        """
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take what `state_dict` of this or another engine returned, once weights and optimizer state are there."""

    @abstractmethod
    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        """Bring a frozen, materialised CPU model to the device, sharded where this engine shards."""

    @abstractmethod
    def close(self) -> None:
        """Release what the engine holds; not the process group."""
