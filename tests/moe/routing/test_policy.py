"""What is read from routers of transformers, and that it is all they compute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules
from leanmill.kernels.topk_router.op import Groups
from leanmill.moe.routing.policy import ARGUMENT, Policy, affinities, policy_of
from tests.core.tiny import tiny


V3 = {"n_routed_experts": 12, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
V2 = V3 | {"n_group": 3, "routed_scaling_factor": 16.0}
BIAS = "e_score_correction_bias"

FOUND = [
    ("mixtral", {}, Policy(4, 2, "softmax")),
    ("mixtral", {"num_experts_per_tok": 1}, Policy(4, 1, "softmax")),
    ("qwen3_moe", {"norm_topk_prob": True}, Policy(4, 2, "softmax")),
    ("qwen3_moe", {"norm_topk_prob": False}, Policy(4, 2, "softmax", normalise=False)),
    ("olmoe", {"num_experts_per_tok": 1}, Policy(4, 1, "softmax", normalise=False)),
    ("gpt_oss", {}, Policy(4, 2, "softmax")),
    ("deepseek_v2", {"topk_method": "greedy"}, Policy(4, 2, "softmax", normalise=False, scaling=4.0)),
    ("deepseek_v2", V2, Policy(12, 3, "softmax", normalise=False, scaling=16.0, groups=Groups(3, 2, 1))),
    ("deepseek_v3", V3, Policy(12, 3, "sigmoid", scaling=2.5, groups=Groups(4, 2, 2), bias=BIAS)),
    ("deepseek_v3", {"n_group": 1, "norm_topk_prob": False, "num_experts_per_tok": 1},
     Policy(4, 1, "sigmoid", normalise=False, scaling=2.5, bias=BIAS)),
    # A frozen parameter below the router; what the block calls it with.
    ("ernie4_5_moe", {}, Policy(4, 2, "softmax", bias=f"moe_statics.{BIAS}")),
    ("minimax_m2", {}, Policy(4, 2, "sigmoid", bias=ARGUMENT)),
]  # fmt: skip


def router_of(family: str, **changes: object) -> tuple[str, nn.Module]:
    name, _, router = next(find_modules(tiny(family, **changes), "router"))
    return name, router


@pytest.mark.parametrize(("family", "changes", "policy"), FOUND)
def test_routers_of_transformers(family, changes, policy):
    name, router = router_of(family, **changes)
    before = {key: value.clone() for key, value in router.state_dict().items()}
    assert policy_of(router, name, 32) == policy
    assert all(torch.equal(value, before[key]) for key, value in router.state_dict().items())
    assert policy_of(router.to("meta"), name, 32) == policy


class Own(nn.Module):
    """A router that someone else wrote."""

    def __init__(self, num_experts: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_experts, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = self.logits(x)
        return logits, *self.choose(logits)

    def logits(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1).topk(2)


class Normed(Own):
    def logits(self, x: Tensor) -> Tensor:
        return super().logits(x / x.norm(dim=-1, keepdim=True))


class Worst(Own):
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.softmax(-1).topk(2, largest=False)


class Squared(Own):
    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return logits.exp().square().topk(2)


class Alone(Own):
    def forward(self, x: Tensor) -> Tensor:
        return self.logits(x)


def test_what_is_not_all_that_a_router_computes_is_not_taken_for_it():
    assert policy_of(Own(), "own", 8) == Policy(6, 2, "softmax", normalise=False)
    for kind in (Normed, Worst):
        assert policy_of(kind(), "own", 8) == Policy(6, 2, "softmax", is_exact=False)


@pytest.mark.parametrize("kind", [Squared, Alone])
def test_other_routers_are_refused(kind):
    with pytest.raises(ConfigError, match=r"some\.gate.*mixtral"):
        policy_of(kind(), "some.gate", 8)


def test_affinities_are_shares_also_where_sigmoids_vanish():
    logits = torch.tensor([[0.0, 1.0, 2.0], [-200.0, -201.0, -202.0]])
    sigmoid = logits[:1].sigmoid()
    expected = torch.cat([sigmoid / sigmoid.sum(), logits[1:].softmax(-1)])
    torch.testing.assert_close(affinities(logits, "sigmoid"), expected)
    torch.testing.assert_close(affinities(logits.bfloat16(), "softmax"), logits.softmax(-1), rtol=1e-2, atol=1e-2)
