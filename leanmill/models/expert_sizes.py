"""What must hold between the numbers of experts, choices and groups of a mixture's configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from leanmill.core.errors import ConfigError


NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""What model families call the number of routed experts of a layer."""
_WITH_GROUPS = (None, "group_limited_greedy", "noaux_tc")
"""Values of `topk_method`, which some families have, under which groups limit a token."""


def check_expert_sizes(hf_config: Any, where: str) -> None:
    """Refuse a mixture whose tokens choose more experts than there are, or groups that do not divide them.

    Args:
        hf_config: A transformers config, of any family.
        where: What settings are called, e.g. `model.config.`.

    Raises:
        ConfigError: Of the first thing that does not hold, with what to give.
    """
    chosen, written = getattr(hf_config, "num_experts_per_tok", None), hf_config.to_dict()
    for key in NUM_EXPERTS:
        count = written.get(key)
        if isinstance(count, int) and isinstance(chosen, int) and count > 0:
            for problem in _problems(key, count, chosen, written):
                raise ConfigError(f"{where}{problem}")


def _problems(key: str, count: int, chosen: int, written: dict[str, Any]) -> Iterator[str]:
    if count < chosen:
        yield f"num_experts_per_tok={chosen} is more than {key}={count}; give at most {count}"
    groups, open_groups = written.get("n_group"), written.get("topk_group")
    if not isinstance(groups, int) or groups < 2 or written.get("topk_method") not in _WITH_GROUPS:
        return
    if count % groups:
        fitting = [str(n) for n in range(1, count + 1) if count % n == 0]
        yield f"n_group={groups} does not divide {key}={count}; give one of {', '.join(fitting[:12])}"
    if not isinstance(open_groups, int):
        return
    if open_groups > groups:
        yield f"topk_group={open_groups} is more than n_group={groups}; give at most {groups}"
    if open_groups * (count // groups) < chosen:
        least = -(-chosen // (count // groups))
        yield (
            f"topk_group={open_groups} of n_group={groups} leaves a token {open_groups * (count // groups)} experts, "
            f"and num_experts_per_tok={chosen}; give topk_group at least {least}"
        )
