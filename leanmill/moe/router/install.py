"""Giving the options of a recipe to the decisions of a model's routers."""

from __future__ import annotations

from dataclasses import replace

from leanmill.core.errors import ConfigError
from leanmill.core.noise import FreshNoise
from leanmill.core.rules import StepRule
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.kernels.topk_router.op import Groups, check_groups
from leanmill.moe.router.capacity import Capacity, Drop, Over
from leanmill.moe.router.expert_choice import ExpertChoice
from leanmill.moe.router.groups import Grouped
from leanmill.moe.router.jitter import Jitter
from leanmill.moe.router.mask_moe import MaskMoe, draw_visible, frequent, read_counts
from leanmill.moe.routing.decision import Decision
from leanmill.moe.routing.install import decisions, skip_what_nobody_takes
from leanmill.moe.routing.policy import Policy


def install(
    sites: Sites,
    context: InstallContext,
    *,
    jitter: float,
    capacity: tuple[float, Drop, Over] | None,
    groups: tuple[int, int, int] | None,
    choice: tuple[float | None, int | None, Over] | None,
    mask: tuple[str, float, int] | None,
) -> list[StepRule]:
    """See `Router` for the arguments, each with its fields in order.

    Raises:
        ConfigError: See `Router.install`.
    """
    found = [decision for _, decision in decisions(sites, context.ledger)]
    if any(decision.options for decision in found):
        raise ConfigError("router is listed twice; keep one entry with the options of both")
    for decision in found:
        if groups is not None:
            _limit(decision, Groups(*groups))
        if capacity is not None:
            decision.add(Capacity(*capacity, decision.policy.score))
        if choice is not None:
            decision.add(_choice(decision.policy, *choice))
    if mask is not None:
        _close(sites, context, found, *mask)
    if capacity is not None or choice is not None:
        skip_what_nobody_takes(sites.model)
    if mask is not None or choice is not None:
        found[0].tokens.watch(sites.model)
    if jitter == 0:
        return []
    for decision in found:
        decision.add(Jitter(decision.name, jitter))
    return [FreshNoise(sites.model, context.seed, "router")]


def _limit(decision: Decision, groups: Groups) -> None:
    policy = decision.policy
    if policy.groups is not None:
        raise ConfigError(
            f"router.groups: {decision.name} limits tokens to {policy.groups.open_groups} of "
            f"{policy.groups.num_groups} groups already; remove groups, and set model.config.n_group and topk_group"
        )
    try:
        check_groups(groups, policy.num_experts, policy.top_k)
    except ValueError as error:
        raise ConfigError(f"router.groups: {error}") from error
    decision.add(Grouped())
    decision.policy = replace(policy, groups=groups)


def _choice(policy: Policy, experts_a_token: float | None, at_most: int | None, over: Over) -> ExpertChoice:
    average = policy.top_k if experts_a_token is None else experts_a_token
    most = min(policy.num_experts, 2 * policy.top_k) if at_most is None else at_most
    if not average <= most <= policy.num_experts:
        raise ConfigError(
            f"router.expert_choice: {average} experts a token and {most} at most, of {policy.num_experts}; set "
            f"experts_a_token <= at_most <= {policy.num_experts}"
        )
    return ExpertChoice(policy, average, most, over)


def _close(
    sites: Sites, context: InstallContext, found: list[Decision], path: str, share: float, num_visible: int
) -> None:
    if context.seed is None:
        raise ConfigError("router.mask_moe draws what tokens see and was given no seed; set `seed: 0` in the recipe")
    is_frequent = frequent(read_counts(path, context.vocab_size), share)
    for decision in found:
        num_experts = decision.policy.num_experts
        if num_visible > num_experts:
            raise ConfigError(
                f"router.mask_moe: {num_visible} visible experts of {num_experts}; set visible_experts to 2 to "
                f"{num_experts}"
            )
        decision.add(
            MaskMoe(draw_visible(is_frequent, num_experts, num_visible, seed=context.seed, name=decision.name))
        )
