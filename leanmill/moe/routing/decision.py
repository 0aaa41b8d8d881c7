"""A router's decision, made here from the router's weights, and handed to all who read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from leanmill.core.around import Around, Call, Ring
from leanmill.core.errors import ConfigError
from leanmill.core.stage import TechniqueModule
from leanmill.kernels.topk_router import naive
from leanmill.kernels.topk_router.op import topk_router
from leanmill.kernels.topk_router.settings import Settings
from leanmill.moe.routing.policy import Policy
from leanmill.moe.routing.projection import project
from leanmill.moe.routing.tokens import Tokens


class Routing(NamedTuple):
    """One forward of one router, for those who read it."""

    logits: Tensor
    """[T, E] fp32, differentiable; -inf where an expert is closed to a token."""
    weights: Tensor
    """[T, K] combine weights, differentiable; 0 where a place is left empty, and of dropped copies."""
    experts: Tensor
    """[T, K] int64: what was chosen, best first, before anything is dropped; E where a place is left empty (a
    masked token, fewer open experts than places)."""
    is_kept: Tensor | None
    """bool [T, K]: False for copies that are dropped, whose experts see them as E; None where none are."""
    counts: Tensor
    """[S, E] int64: how often each expert was chosen by each sequence's tokens, dropped copies included."""
    z_loss: Tensor
    """Scalar fp32, differentiable: mean of logsumexp(logits)^2 over tokens that are not masked. NaN where
    nobody asked for a decision (`Decision.decides`): who only looks has no loss."""
    mean_probability: Tensor
    """[S, E] fp32, differentiable: mean share of affinity (see `affinities`) over a sequence's tokens; NaN likewise."""
    token_mask: Tensor | None
    """bool [T]: False for padding; None where all tokens count."""


class Reader(TechniqueModule):
    """Looks at every forward of one router, in training and in eval mode; brought by `Decision.tell`.

    Readers of one router are called in the order of their techniques' names.
    """

    technique: ClassVar[str]
    """Registered name of the technique, for messages."""

    @property
    def is_looking(self) -> bool:
        """Whether it does anything in the forward under way; true in compiled code, which would be compiled twice."""
        return True

    def forward(self, routing: Routing) -> Tensor:
        """Return `routing.weights`, or them with losses attached (`Account.attach`): values stay."""
        raise NotImplementedError


class Option(TechniqueModule):
    """One thing that a decision does otherwise; brought by `Decision.add`. What is not overridden changes nothing."""

    key: ClassVar[str]
    """What a recipe calls it; an option of each key at most."""
    changes_inference: ClassVar[bool] = False
    """Whether it is there in eval mode too, so that no plain model computes the same."""

    def on_hidden(self, hidden: Tensor, tokens: Tokens) -> Tensor:
        """Change what logits are computed from [T, H]; the experts see it as it was."""
        return hidden

    def on_logits(self, logits: Tensor, tokens: Tokens) -> Tensor:
        """Change the logits [T, E], fp32; -inf closes an expert to a token."""
        return logits

    def on_routing(self, routing: Routing) -> Routing:
        """Change what was chosen."""
        return routing


class Decision(Around):
    """Decides in the router's place, by `topk_router`, in fp32 whatever the model computes in.

    In eval mode without options that change inference, where the policy is not exact, and where nobody asked for a
    decision (`decides`), the router decides itself, and readers are shown that.

    Args:
        policy: Of the router.
        tokens: Of the model.
        name: Of the router, for messages.
    """

    technique = "routing"
    ring = Ring.DECIDE

    def __init__(self, policy: Policy, tokens: Tokens, name: str) -> None:
        super().__init__()
        self.policy, self.tokens, self.name = policy, tokens, name
        self.readers, self.options = nn.ModuleDict(), nn.ModuleDict()
        self.skips_empty = False
        """Whether the experts know that expert E is nobody; else empty places hold expert 0 with weight 0."""
        self.decides = False
        """Whether a technique asked for the decision; else all are here to look, and the router's stays bitwise."""

    def tell(self, reader: Reader) -> None:
        """Show `reader` every forward."""
        self.readers = _with(self.readers, reader.technique, reader)
        self.train(self.training)

    def add(self, option: Option) -> None:
        """Decide with `option`.

        Raises:
            ConfigError: It is not known what this router computes.
        """
        if not self.policy.is_exact:
            raise ConfigError(
                f"the router {self.name} computes more than a choice by score, which {option.key} cannot change; "
                f"remove it, or choose a model of mixtral, qwen3_moe, olmoe, deepseek_v2, deepseek_v3 or gpt_oss"
            )
        self.options = _with(self.options, option.key, option)
        self.train(self.training)

    def reset_parameters(self) -> None:
        for part in (*self.readers.values(), *self.options.values()):
            part.reset_parameters()  # type: ignore[operator]

    @property
    def changes_inference(self) -> bool:
        """Whether it decides in eval mode too."""
        return any(option.changes_inference for option in self.options.values())

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Return (logits [T, E], combine weights [T, K], experts [T, K]), and what else the router returns.

        Of what is decided here, logits and weights are fp32. Copies that are not computed have weight 0, and
        expert E where experts skip it (see `skips_empty`).
        """
        readers = [reader for reader in self.readers.values() if reader.is_looking]
        if self.policy.is_exact and ((self.training and self.decides) or self.changes_inference):
            routing, rest = self._decide(args[0], [*args[1:], *kwargs.values()]), []
        else:
            output = call(*args, **kwargs)
            if not readers:
                return output
            logits, weights, experts, *rest = output
            routing = self._observe(logits, weights, experts)
        for reader in readers:
            routing = routing._replace(weights=reader(routing))
        return (routing.logits, routing.weights, self._sent_to(routing), *rest)

    def _decide(self, hidden: Tensor, given: Sequence[Tensor]) -> Routing:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        router, policy = self.module, self.policy
        options: list[Option] = list(self.options.values())  # type: ignore[arg-type]
        shaken = hidden
        for option in options:
            shaken = option.on_hidden(shaken, self.tokens)
        logits = project(shaken, router.weight, getattr(router, "bias", None))  # type: ignore[arg-type]
        for option in options:
            logits = option.on_logits(logits, self.tokens)
        mask, num_sequences = self.tokens.of(len(hidden), is_training=self.training)
        routed = topk_router(
            logits,
            policy.top_k,
            score=policy.score,
            normalise=policy.normalise,
            bias=policy.bias_of(router, given),
            scaling=policy.scaling,
            groups=policy.groups,
            token_mask=mask,
            num_sequences=num_sequences,
        )
        sums = routed.counts, routed.z_loss, routed.mean_probability
        routing = Routing(logits, routed.weights, routed.experts, None, *sums, mask)
        for option in options:
            routing = option.on_routing(routing)
        return routing

    def _observe(self, logits: Tensor, weights: Tensor, experts: Tensor) -> Routing:
        mask, num_sequences = self.tokens.of(len(logits), is_training=self.training)
        # The router sends padding somewhere too, which counts nowhere.
        counted = experts if mask is None else experts.masked_fill(~mask.unsqueeze(-1), self.policy.num_experts)
        if not self.decides:
            unknown = logits.new_full((), torch.nan, dtype=torch.float32)
            counts = naive.counts(counted, self.policy.num_experts, num_sequences)
            return Routing(logits, weights, experts, None, counts, unknown, unknown.expand(counts.shape), mask)
        settings = Settings(1, self.policy.score == "sigmoid", True, 1.0, num_sequences=num_sequences)
        sums = naive.side_sums(logits, counted, mask, settings)
        return Routing(logits, weights, experts, None, *sums, mask)

    def _sent_to(self, routing: Routing) -> Tensor:
        experts = routing.experts
        if routing.is_kept is None and routing.token_mask is None and not self.options:
            return experts
        if routing.is_kept is not None:
            experts = experts.masked_fill(~routing.is_kept, self.policy.num_experts)
        if self.skips_empty:
            return experts
        return experts.masked_fill(experts == self.policy.num_experts, 0)

    def fold(self, module: nn.Module) -> None:
        """Leave the router as it is, which computes in eval mode what was trained.

        Raises:
            ConfigError: An option changes that.
        """
        changing = [name for name, option in self.options.items() if option.changes_inference]
        if changing:
            raise ConfigError(
                f"{self.name} was trained with router.{changing[0]}, which no plain router of transformers computes, "
                f"so an export would be another model; score the checkpoint with `leanmill eval`, or train without it"
            )


def _with(held: nn.ModuleDict, name: str, module: nn.Module) -> nn.ModuleDict:
    members = {**held._modules, name: module}
    return nn.ModuleDict({name: members[name] for name in sorted(members)})  # type: ignore[misc]
