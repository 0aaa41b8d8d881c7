"""Which biases a run's routers have, and their rule."""

from __future__ import annotations

from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.places import Place
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.balancing.bias import BiasedRouter, BiasRule
from leanmill.moe.loads.loads import loads_of
from leanmill.moe.routing.install import decisions
from leanmill.moe.routing.policy import ARGUMENT, Policy


def move_biases(sites: Sites, context: InstallContext, *, rate: float, until: float) -> None:
    """Have the bias of every router of the model moved, by a rule of the run.

    Raises:
        ConfigError: The model has no routers, or ones without a bias that an export would carry.
    """
    loads, routers = loads_of(sites, context), []
    if any(isinstance(rule, BiasRule) for rule in context.shared_rules()):
        raise ConfigError("bias_balance is listed twice; keep one entry")
    for (place, decision), layer in zip(decisions(sites, context.ledger), loads.layers, strict=True):
        found = _held(sites.model, place, decision.policy)
        if found is None:
            raise ConfigError(
                f"bias_balance: {place.name} has no bias that changes only the choice of experts, which an export "
                f"would carry; choose a family that has, e.g. model.config.model_type: deepseek_v3, or a loss: "
                f"router_balance"
            )
        owner, name = found
        routers.append(BiasedRouter(router=place.module, path=place.name, counts=layer, owner=owner, name=name))
    context.shared(BiasRule, lambda: BiasRule(loads, routers, rate=rate, until=until))


def _held(model: nn.Module, place: Place, policy: Policy) -> tuple[nn.Module, str] | None:
    """Return the module that holds a router's bias, and the name of the buffer; None where it has none."""
    if policy.bias is None:
        return None
    if policy.bias != ARGUMENT:
        above, _, name = policy.bias.rpartition(".")
        return place.module.get_submodule(above), name
    around = model.get_submodule(place.name.rpartition(".")[0])
    names = [
        name
        for name, buffer in around._buffers.items()
        if buffer is not None and buffer.is_floating_point() and buffer.shape == (policy.num_experts,)
    ]
    return (around, names[0]) if len(names) == 1 else None
