"""Standing a decision around every router of a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from leanmill.core.around import arounds
from leanmill.core.batches import Batch
from leanmill.core.ledger import Ledger
from leanmill.core.places import Place
from leanmill.core.sites import Sites
from leanmill.moe.routing.decision import Decision
from leanmill.moe.routing.policy import Policy, policy_of
from leanmill.moe.routing.tokens import Tokens


def decisions(sites: Sites, ledger: Ledger) -> list[tuple[Place, Decision]]:
    """Return the decision of every router, the same for all who ask.

    Args:
        sites: Of the model.
        ledger: Of the run.

    Raises:
        ConfigError: The model has no routers, or ones whose output is not understood.
    """
    places = sites.modules("router")
    found = [decision_of(place.module) for place in places]
    if not all(found):
        _stand(sites, ledger, places)
    return [(place, _decision(place.module)) for place in places]


def decision_of(router: nn.Module) -> Decision | None:
    """Return the decision that stands around a router, where one does."""
    return next((around for around in arounds(router) if isinstance(around, Decision)), None)


def _decision(router: nn.Module) -> Decision:
    decision = decision_of(router)
    assert decision is not None
    return decision


def _stand(sites: Sites, ledger: Ledger, places: list[Place]) -> None:
    hidden_size: int = sites.model.config.get_text_config().hidden_size  # type: ignore[union-attr, operator, assignment]
    tokens, known = Tokens(), dict[Any, Policy]()
    for place in places:
        key = _settings(place.module)
        if key not in known:
            known[key] = policy_of(place.module, place.name, hidden_size)
        place.around(Decision(known[key], tokens, place.name))
    experts = [module for module in sites.model.modules() if hasattr(module, "_is_expert_parallel")]

    def begin_forward(batch: Batch) -> None:
        tokens.begin_forward(batch)
        _leave_empty_places(experts, has_padding=tokens.mask is not None)

    ledger.before_forward(begin_forward)


def _leave_empty_places(experts: list[Any], *, has_padding: bool) -> None:
    """Have transformers' experts take no notice of the places that masked tokens leave empty.

    They know such places from expert parallelism alone; elsewhere a grouped product would leave rows unwritten.
    """
    for module in experts:
        module._is_expert_parallel = has_padding


def _settings(router: nn.Module) -> Any:
    """What tells routers apart that decide differently: layers of one model seldom do."""
    plain = {name: value for name, value in vars(router).items() if isinstance(value, (bool, int, float, str))}
    shapes = [(name, tensor.shape) for name, tensor in (*router.named_parameters(), *router.named_buffers())]
    return type(router), tuple(sorted(plain.items())), tuple(shapes)
