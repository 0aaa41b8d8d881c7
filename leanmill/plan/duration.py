"""How long a planned run takes and what it costs, from a rate that is given or was measured."""

from __future__ import annotations

from dataclasses import dataclass

from leanmill.core.errors import ConfigError


SECONDS_A_DAY, SECONDS_AN_HOUR = 86_400, 3_600


@dataclass(frozen=True, kw_only=True)
class Duration:
    """Time of a run; None where the recipe gives epochs, which only its data turns into steps."""

    tokens_per_second: float
    """Of all ranks together."""
    step_seconds: float
    days: float | None
    rank_hours: float | None
    cost: float | None
    """In the currency of the price; None without one."""


def duration(
    *,
    flops_per_token: float,
    tokens_per_step: int,
    total_tokens: int | None,
    world_size: int,
    tokens_per_second: float | None = None,
    rank_tflops: float | None = None,
    price_per_rank_hour: float | None = None,
) -> Duration | None:
    """Predict from one of two rates; None where there is neither.

    Args:
        flops_per_token: Of training, forward and backward.
        tokens_per_step: Over all ranks.
        total_tokens: Of the run, None where that is not known.
        world_size: Ranks.
        tokens_per_second: Measured, of all ranks together.
        rank_tflops: What one rank sustains in training, TFLOP/s: its peak times the MFU it reaches.
        price_per_rank_hour: In any currency.

    Raises:
        ConfigError: Both rates are given.
    """
    if tokens_per_second is not None and rank_tflops is not None:
        raise ConfigError("--tokens-per-second and --rank-tflops both say how fast the run is; give one of them")
    if rank_tflops is not None:
        tokens_per_second = world_size * rank_tflops * 1e12 / flops_per_token
    if tokens_per_second is None:
        return None
    seconds = None if total_tokens is None else total_tokens / tokens_per_second
    rank_hours = None if seconds is None else world_size * seconds / SECONDS_AN_HOUR
    is_priced = rank_hours is not None and price_per_rank_hour is not None
    return Duration(
        tokens_per_second=tokens_per_second,
        step_seconds=tokens_per_step / tokens_per_second,
        days=None if seconds is None else seconds / SECONDS_A_DAY,
        rank_hours=rank_hours,
        cost=rank_hours * price_per_rank_hour if is_priced else None,  # type: ignore[operator]
    )
