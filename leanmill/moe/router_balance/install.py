"""Standing by every router of a model."""

from __future__ import annotations

from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.core.technique import InstallContext
from leanmill.moe.balancing.factors import Devices
from leanmill.moe.balancing.losses import Balance, Kind
from leanmill.moe.balancing.rule import BalanceRule, Estimator, Scope
from leanmill.moe.loads.loads import loads_of
from leanmill.moe.routing.install import decisions


def balance_routers(
    sites: Sites,
    context: InstallContext,
    *,
    weights: dict[Kind, float],
    z_weight: float,
    scope: Scope,
    estimator: Estimator,
    devices: Devices | None,
) -> BalanceRule:
    """Read every router of the model; all losses are means over layers.

    Raises:
        ConfigError: The model has no routers, ones whose output is not understood, or a number of experts that the
            devices do not divide; or another entry balances them.
    """
    loads = loads_of(sites, context)
    weights = {kind: weight / len(loads.layers) for kind, weight in weights.items()}
    counts_sent, balances = "router_communication" in weights, []
    for layer, (place, decision) in zip(loads.layers, decisions(sites, context.ledger), strict=True):
        if Balance.technique in decision.readers:
            raise ConfigError("router_balance is listed twice; keep one entry, whose `weight` is the sum of both")
        balance = Balance(
            context.ledger,
            layer,
            loads.tokens,
            weights=weights,
            z_weight=z_weight / len(loads.layers),
            over_rows=scope == "sequence",
            devices=devices,
            sent=loads.open(f"sent/{place.name}", devices.number) if counts_sent and devices is not None else None,
        )
        if devices is not None:
            _check(devices, place.name, layer.policy.num_experts)
        decision.tell(balance)
        balances.append((balance, layer))
    return BalanceRule(context.ledger, loads, balances, scope=scope, estimator=estimator, devices=devices)


def _check(devices: Devices, name: str, num_experts: int) -> None:
    if num_experts % devices.number:
        divisors = [number for number in range(2, num_experts + 1) if num_experts % number == 0]
        raise ConfigError(
            f"router_balance.num_devices={devices.number} does not divide the {num_experts} experts of {name}; set one "
            f"of {divisors}"
        )
