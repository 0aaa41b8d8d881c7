"""Keeping LoRA experts equally loaded, with the losses and the biases that routers of a model have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from leanmill.core.around import put_around
from leanmill.core.branches import branched_layers
from leanmill.core.ledger import Ledger
from leanmill.core.names import clean_name
from leanmill.core.rules import StepRule
from leanmill.core.technique import Installation
from leanmill.moe.balancing.bias import BiasedRouter, BiasRule
from leanmill.moe.balancing.losses import Balance
from leanmill.moe.balancing.rule import BalanceRule
from leanmill.moe.loads.loads import Loads
from leanmill.moe.routing.decision import Decision
from leanmill.moe.routing.tokens import Tokens


def balanced(installation: Installation, options: Mapping[str, Any], ledger: Ledger) -> Installation:
    """Return the installation of a method that routes tokens, with its experts' loads counted and balanced.

    Loads are those of the whole step, of all ranks; a loss takes those that are known when a micro-batch has run.
    Adapters' losses and rules have names of their own beside those of a model's routers (`lora_router_balance`).

    Args:
        installation: Whose layers have routers once its branches are there.
        options: Of the method.
        ledger: Of the run.
    """
    from leanmill.peft_ext.tuners.moe_lora import MoeLoraConfig

    config, add_unbalanced = MoeLoraConfig(**options), installation.add_branches
    assert add_unbalanced is not None
    if config.balance == "none":
        return installation
    balance = _Balancing(config, ledger)

    def add_branches(model: nn.Module) -> None:
        add_unbalanced(model)
        balance.stand(model)

    return replace(installation, add_branches=add_branches, step_rules=balance.rules)


class _Balancing:
    """Counts and balances; routers are added to the rules once they are there."""

    def __init__(self, config: Any, ledger: Ledger) -> None:
        self._config, self._ledger = config, ledger
        self._tokens, self._loads = Tokens(), Loads(ledger, ())
        self._loads.demand.every_step = True
        self._balances: list[Any] = []
        self._biased: list[BiasedRouter] = []
        ledger.before_forward(self._tokens.begin_forward)
        rule: StepRule
        if config.balance == "loss":
            rule = BalanceRule(
                ledger, self._loads, self._balances, scope="global_batch", estimator="running", devices=None
            )
        else:
            rule = BiasRule(self._loads, self._biased, rate=config.bias_rate, until=1.0)
        self.rules = (self._loads, rule)
        for one in self.rules:
            one.name = f"lora_{one.name}"

    def stand(self, model: nn.Module) -> None:
        """Stand around the routers of a model's adapters."""
        found = [
            (f"{clean_name(path)}.{adapter}", router)
            for path, layer in branched_layers(model)
            for adapter, router in layer.moe_lora_router.items()
        ]
        for index, (name, router) in enumerate(found):
            decision = Decision(self._config.policy, self._tokens, name)
            decision.decides = decision.skips_empty = True
            put_around(router, decision)
            counts = self._loads.count(index, name, decision)
            if self._config.balance == "bias":
                self._biased.append(
                    BiasedRouter(router=router, path=name, counts=counts, owner=router, name="choice_bias")
                )
                continue
            loss = Balance(
                self._ledger,
                counts,
                self._loads.tokens,
                weights={"router_balance": self._config.balance_weight / len(found)},
                z_weight=0.0,
                over_rows=False,
                devices=None,
                sent=None,
                prefix="lora_",
            )
            decision.tell(loss)
            self._balances.append((loss, counts))
