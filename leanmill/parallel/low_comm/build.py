"""From a recipe's `layout.low_comm` to what workers do together."""

from __future__ import annotations

from datetime import timedelta

from leanmill.parallel.engine import Engine
from leanmill.parallel.launch import keep_timeout
from leanmill.parallel.low_comm.co2 import Co2Steps
from leanmill.parallel.low_comm.outer import OuterSteps
from leanmill.parallel.low_comm_config import CO2, OuterConfig


def outer_steps(config: OuterConfig, engine: Engine) -> OuterSteps:
    """Return what the workers of a prepared engine do together; collective."""
    if engine.layout.across is not None:
        keep_timeout(engine.layout.across, timedelta(seconds=config.patience_seconds))
    return Co2Steps(config, engine) if isinstance(config, CO2) else OuterSteps(config, engine)
