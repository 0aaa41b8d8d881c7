"""Standing a decision around every router of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import nn

from leanmill.core.around import arounds
from leanmill.core.batches import Batch
from leanmill.core.errors import ConfigError
from leanmill.core.experts import IMPLEMENTATION, is_stacked_experts, use_our_compute
from leanmill.core.ledger import Ledger
from leanmill.core.places import Place, find_modules
from leanmill.core.sites import Sites
from leanmill.moe.routing.decision import Decision
from leanmill.moe.routing.policy import ARGUMENT, Policy, policy_of
from leanmill.moe.routing.tokens import Tokens


def decisions(sites: Sites, ledger: Ledger, *, decide: bool = True) -> list[tuple[Place, Decision]]:
    """Return the decision of every router, the same for all who ask.

    Args:
        sites: Of the model.
        ledger: Of the run.
        decide: Whether whoever asks wants routers decided by `topk_router`; False only looks at what they decide, or
            at what somebody else has decided.

    Raises:
        ConfigError: The model has no routers, or ones whose output is not understood.
    """
    places = sites.modules("router")
    found = [decision_of(place.module) for place in places]
    if not all(found):
        _stand(sites, ledger, places)
    standing = [(place, _decision(place.module)) for place in places]
    for place, decision in standing:
        if decide and decision.policy.bias not in (None, ARGUMENT):
            hold_whole(place.module, str(decision.policy.bias))
        decision.decides |= decide
    return standing


def hold_whole(router: nn.Module, path: str) -> None:
    """Make a bias that the family has as a frozen parameter a buffer of the same name.

    Engines shard parameters, and gather those of a module where it is called; a decision reads the bias of a module
    below the router that nobody calls.
    """
    above, _, name = path.rpartition(".")
    owner = router.get_submodule(above)
    if name in owner._parameters:
        parameter = owner._parameters.pop(name)
        assert parameter is not None
        owner.register_buffer(name, parameter.detach())


def skips_empty_places(model: nn.Module) -> Callable[[], bool]:
    """Return what says whether all experts of a model are computed by code that knows empty places."""
    configs = [getattr(module, "config", None) for module in model.modules() if is_stacked_experts(module)]
    return lambda: {getattr(config, "_experts_implementation", None) for config in configs} == {IMPLEMENTATION}


def check_routers(model: nn.Module) -> None:
    """Refuse routers that nobody could stand around.

    Raises:
        ConfigError: A router's output is not understood.
    """
    _policies(model, [(path, router) for path, _, router in find_modules(model, "router")])


def skip_what_nobody_takes(model: nn.Module) -> None:
    """Have experts computed by code that knows empty places, where there is such for them; else they cost time."""
    for path, module in model.named_modules():
        if is_stacked_experts(module):
            with suppress(ConfigError):
                use_our_compute(module, path, remedy="")


def decision_of(router: nn.Module) -> Decision | None:
    """Return the decision that stands around a router, where one does."""
    return next((around for around in arounds(router) if isinstance(around, Decision)), None)


def _decision(router: nn.Module) -> Decision:
    decision = decision_of(router)
    assert decision is not None
    return decision


def _stand(sites: Sites, ledger: Ledger, places: list[Place]) -> None:
    tokens, found = Tokens(), []
    policies = _policies(sites.model, [(place.name, place.module) for place in places])
    for place, policy in zip(places, policies, strict=True):
        found.append(Decision(policy, tokens, place.name))
        place.around(found[-1])

    skips = skips_empty_places(sites.model)

    def look(batch: Batch) -> None:
        # Asked here, since techniques installed later may choose how experts are computed.
        skips_empty = skips()
        for decision in found:
            decision.skips_empty = skips_empty
        tokens.begin_forward(batch)

    ledger.before_forward(look)


def _policies(model: nn.Module, routers: Sequence[tuple[str, nn.Module]]) -> list[Policy]:
    """How each router, given with its name, decides."""
    hidden_size: int = model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]
    known: dict[Any, Policy] = {}
    for name, router in routers:
        key = _settings(router)
        if key not in known:
            known[key] = policy_of(router, name, hidden_size)
    return [known[_settings(router)] for _, router in routers]


def _settings(router: nn.Module) -> Any:
    """What tells routers apart that decide differently: layers of one model seldom do."""
    plain = {name: value for name, value in vars(router).items() if isinstance(value, (bool, int, float, str))}
    shapes = [(name, tensor.shape) for name, tensor in (*router.named_parameters(), *router.named_buffers())]
    return type(router), tuple(sorted(plain.items())), tuple(shapes)
