"""A router's decision, made here from the router's weights, and handed to all who read it."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from leanmill.core.around import Around, Call, Ring
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
    """Scalar fp32, differentiable: mean of logsumexp(logits)^2 over tokens that are not masked."""
    mean_probability: Tensor
    """[S, E] fp32, differentiable: mean share of affinity (see `affinities`) over a sequence's tokens."""
    token_mask: Tensor | None
    """bool [T]: False for padding; None where all tokens count."""


class Reader(TechniqueModule):
    """Looks at every forward of one router, in training and in eval mode; brought by `Decision.tell`.

    Readers of one router are called in the order of their techniques' names.
    """

    technique: ClassVar[str]
    """Registered name of the technique, for messages."""

    def forward(self, routing: Routing) -> Tensor:
        """Return `routing.weights`, or them with losses attached (`Account.attach`): values stay."""
        raise NotImplementedError


class Decision(Around):
    """Decides in the router's place, by `topk_router`, in fp32 whatever the model computes in.

    In eval mode, and where the policy is not exact, the router decides itself, and readers are shown that.
    Ranks and recomputation see the same numbers: nothing is drawn, nothing is kept.

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
        self.readers = nn.ModuleDict()

    def tell(self, reader: Reader) -> None:
        """Show `reader` every forward."""
        held = {**self.readers._modules, reader.technique: reader}
        self.readers = nn.ModuleDict({name: held[name] for name in sorted(held)})
        self.readers.train(self.training)

    def reset_parameters(self) -> None:
        for reader in self.readers.values():
            reader.reset_parameters()  # type: ignore[operator]

    def forward(self, call: Call, /, *args: Any, **kwargs: Any) -> Any:
        """Return (logits [T, E], combine weights [T, K], experts [T, K]), and what else the router returns.

        Of what is decided here, logits and weights are fp32. Copies that are not computed have weight 0 and
        expert E.
        """
        if self.training and self.policy.is_exact:
            routing, rest = self._decide(args[0]), []
        else:
            output = call(*args, **kwargs)
            if not self.readers:
                return output
            logits, weights, experts, *rest = output
            routing = self._observe(logits, weights, experts)
        for reader in self.readers.values():
            routing = routing._replace(weights=reader(routing))
        return (routing.logits, routing.weights, routing.experts, *rest)

    def _decide(self, hidden: Tensor) -> Routing:
        hidden = hidden.reshape(-1, hidden.shape[-1])
        router, policy = self.module, self.policy
        logits = project(hidden, router.weight, getattr(router, "bias", None))  # type: ignore[arg-type]
        mask, num_sequences = self.tokens.of(len(hidden))
        routed = topk_router(
            logits,
            policy.top_k,
            score=policy.score,
            normalise=policy.normalise,
            bias=None if policy.bias is None else router._buffers[policy.bias],
            scaling=policy.scaling,
            groups=policy.groups,
            token_mask=mask,
            num_sequences=num_sequences,
        )
        sums = routed.counts, routed.z_loss, routed.mean_probability
        return Routing(logits, routed.weights, routed.experts, None, *sums, mask)

    def _observe(self, logits: Tensor, weights: Tensor, experts: Tensor) -> Routing:
        mask, num_sequences = self.tokens.of(len(logits)) if self.training else (None, 1)
        settings = Settings(1, self.policy.score == "sigmoid", True, 1.0, num_sequences=num_sequences)
        sums = naive.side_sums(logits, experts, mask, settings)
        return Routing(logits, weights, experts, None, *sums, mask)
