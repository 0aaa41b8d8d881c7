"""When a step stands out, against the rule written out over a list."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass

import pytest
import torch

from leanmill.trainer.spikes import SpikeWatch


@dataclass(frozen=True)
class Settings:
    sigmas: float = 2.5
    window_steps: int = 7


def expected(pairs: list[tuple[float, float]], settings: Settings) -> list[bool]:
    seen: list[tuple[float, float]] = []
    found = []
    for pair in pairs:
        is_finite = all(value == value and abs(value) != float("inf") for value in pair)
        window = seen[-settings.window_steps :]
        stands_out = False
        if is_finite and len(seen) >= max(2, settings.window_steps // 2):
            for now, before in zip(pair, zip(*window, strict=True), strict=True):
                stands_out |= now > statistics.fmean(before) + settings.sigmas * statistics.stdev(before)
        found.append(stands_out)
        if is_finite:
            seen.append(pair)
    return found


def pairs_with(seed: int) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 + 0.1 * torch.randn(40, 2, generator=generator)
    values[2, 0], values[11, 0], values[20, 1], values[21, 1] = 50.0, 4.5, 9.0, float("nan")
    values[30:] += 2  # a level that stays
    return [(float(loss), float(norm)) for loss, norm in values]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cut", [0, 5, 23])
def test_spikes_are_those_of_the_rule_also_over_a_resume(seed: int, cut: int) -> None:
    pairs, settings = pairs_with(seed), Settings()
    watch, found = SpikeWatch(settings, torch.device("cpu")), []
    for index, (loss, norm) in enumerate(pairs):
        if index == cut:
            state = json.loads(json.dumps(watch.state_dict()))
            watch = SpikeWatch(settings, torch.device("cpu"))
            watch.load_state_dict(state)
        found.append(bool(watch.stands_out(torch.tensor(loss), torch.tensor(norm))))
    assert found == expected(pairs, settings)
    assert found[11]
    assert found[20]
    assert not found[2], "too early to tell"
    assert not found[21], "what is not finite is another trouble"
    assert found[30]
    assert not found[39], "a level that stays is no spike"


def test_a_level_without_any_spread_is_left_upwards_only() -> None:
    watch = SpikeWatch(Settings(), torch.device("cpu"))
    one = torch.ones(())
    assert not any(watch.stands_out(one, one) for _ in range(9))
    assert not watch.stands_out(one * 0.5, one)


def test_another_window_takes_the_newest_steps() -> None:
    pairs = pairs_with(0)[:11]
    watch = SpikeWatch(Settings(), torch.device("cpu"))
    for loss, norm in pairs:
        watch.stands_out(torch.tensor(loss), torch.tensor(norm))
    shorter = SpikeWatch(Settings(window_steps=4), torch.device("cpu"))
    shorter.load_state_dict(watch.state_dict())
    assert shorter.state_dict()["count"] == 4
    torch.testing.assert_close(torch.tensor(shorter.state_dict()["values"]).T, torch.tensor(pairs[-4:]))
