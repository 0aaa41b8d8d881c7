from __future__ import annotations

import pytest

from leanmill.report.units import count, duration, number, percent, plural, scientific, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (7, "7"), (999, "999"), (999.6, "1k"), (1234, "1.23k"), (999_499, "999k"), (999_600, "1M"),
        (5_243_136, "5.24M"), (1.5e9, "1.5B"), (2e12, "2T"), (0.5, "0.5"), (123.4, "123"),
    ],
)  # fmt: skip
def test_count(value: float, text: str) -> None:
    assert count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (125, "2m05s"), (3725, "1h02m"), (90_000, "1d01h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "0.999 KiB"), (1536, "1.5 KiB"), (3 * 2**30, "3 GiB"), (2**42, "4 TiB")],
)
def test_size(num_bytes: float, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.18612, "1.186"), (12.3456, "12.35"), (1234.6, "1235"), (0.5, "0.5"), (-0.1489, "-0.1489"),
     (3e-5, "3e-5"), (2.5e7, "2.5e7"), (100.0, "100")],
)  # fmt: skip
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_small_helpers() -> None:
    assert (scientific(3.04e-4), scientific(0), scientific(1.0)) == ("3.04e-4", "0", "1e0")
    assert (percent(0.4134), percent(0), percent(1), percent(95.1)) == ("41.3%", "0%", "100%", "9,510%")
    assert (plural(1, "rank"), plural(1200, "step")) == ("1 rank", "1,200 steps")
