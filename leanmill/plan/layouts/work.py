"""What of a model decides how long a step takes, in numbers: work of a token, weights that travel, widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leanmill.models.expert_sizes import NUM_EXPERTS
from leanmill.plan.subject import Subject
from leanmill.plan.transient import attention_widths, mlp_width


@dataclass(frozen=True, kw_only=True)
class Work:
    """A model, before anything is shared. Elements, not bytes."""

    flops_per_token: float
    """Forward and backward."""
    num_layers: int
    hidden: int
    inner: float
    """Width of the MLP that a token goes through."""
    projected: float
    """Width of all that attention's projections return."""
    attended: float
    num_heads: int
    num_groups: int
    head_dim: int
    num_experts: int
    """0 without."""
    top_k: int
    num_expert_layers: int
    dense: int
    """Weights of blocks outside experts."""
    experts: int
    """Weights of all experts."""
    root: int
    """Weights outside of blocks: embedding, head, last norm."""
    trained: int
    """Of all of them."""
    split: int
    """Of dense and root, those that ranks of a tensor-parallel group have parts of."""
    expert_flops_share: float
    """Of the matmuls of a token."""

    @classmethod
    def of(cls, subject: Subject) -> Work:
        """Read it off a planned model."""
        config, weights = subject.config, subject.weights
        heads = config.num_attention_heads
        projected, attended = attention_widths(config)
        experts = sum(w.numel for w in weights if w.is_expert)
        num_experts = _number(config, NUM_EXPERTS)
        top_k = _number(config, ("num_experts_per_tok",))
        active = experts * top_k / num_experts if num_experts else 0.0
        in_blocks = [w for w in weights if w.block is not None and not w.is_expert]
        outside = [w for w in weights if w.block is None]
        return cls(
            flops_per_token=subject.flops_per_token,
            num_layers=len(subject.token_shares),
            hidden=config.hidden_size,
            inner=mlp_width(config),
            projected=projected,
            attended=attended,
            num_heads=heads,
            num_groups=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            num_experts=num_experts,
            top_k=top_k,
            num_expert_layers=len({w.block for w in weights if w.is_expert}),
            dense=sum(w.numel for w in in_blocks),
            experts=experts,
            root=sum(w.numel for w in outside),
            trained=sum(w.numel for w in weights if w.trainable),
            split=sum(w.numel for w in weights if w.split_dim is not None),
            expert_flops_share=min(1.0, 6.0 * active / subject.flops_per_token),
        )


def _number(config: Any, names: tuple[str, ...]) -> int:
    found = (getattr(config, name, None) for name in names)
    return next((number for number in found if isinstance(number, int)), 0)
