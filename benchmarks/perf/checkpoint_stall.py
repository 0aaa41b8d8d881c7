"""How long a save holds the loop up: asynchronous over synchronous, same state, training between saves."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common import make_loop, recipe_15m, stepper
from machine import conditions, write_result
from options import DEFAULTS

from leanmill.checkpoint.config import CheckpointConfig
from leanmill.checkpoint.manager import CheckpointManager
from leanmill.trainer.loop import Loop


def stalls(loop: Loop, *, asynchronous: bool, saves: int, steps_between: int) -> list[float]:
    """Seconds each save kept the loop waiting; the first, which allocates buffers, is left out."""
    folder = Path(loop.recipe.run_dir) / ("async" if asynchronous else "sync")
    manager = CheckpointManager(folder, CheckpointConfig(asynchronous=asynchronous), overlap=True)
    waits: list[float] = []
    loop.before_update = lambda: waits.append(manager.finish_copies())
    step, seconds = stepper(loop), []
    for _ in range(saves + 1):
        for _ in range(steps_between):
            step()
        state = {"step": loop.step, "tokens": loop.data.position_tokens, "data": loop.data.state_dict()}
        seconds.append(manager.save(loop.step, loop.engine, state, loop.recipe.model_dump(mode="json")))
        waits.clear()
        # The next update waits for copies that run beside its forward and backward; that counts too.
        step()
        seconds[-1] += sum(waits)
    manager.wait()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=DEFAULTS["checkpoint_stall"]["saves"])
    parser.add_argument(
        "--steps-between",
        type=int,
        default=DEFAULTS["checkpoint_stall"]["steps_between"],
        help="a write is done before the next save",
    )
    arguments = parser.parse_args()
    measured_under = conditions()
    loop = make_loop(recipe_15m())
    options = {"saves": arguments.saves, "steps_between": arguments.steps_between}
    synchronous = statistics.median(stalls(loop, asynchronous=False, **options))
    asynchronous = statistics.median(stalls(loop, asynchronous=True, **options))
    figures = {
        "asynchronous_stall_over_synchronous": asynchronous / synchronous,
        "synchronous_seconds_median": synchronous,
        "asynchronous_stall_seconds_median": asynchronous,
        **options,
    }
    write_result("checkpoint_stall", figures, measured_under)


if __name__ == "__main__":
    main()
