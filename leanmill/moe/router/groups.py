"""The limit of a choice to some groups, as an option."""

from __future__ import annotations

from leanmill.moe.routing.decision import Option


class Grouped(Option):
    """Says that the decision's policy has got groups that the router has not; `topk_router` does the rest."""

    key = "groups"
    changes_inference = True
