"""What a mistyped name, or a number that does not divide, may have meant. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near_names(given: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.5) -> list[str]:
    """Return up to `count` of the `known` names that resemble `given`, best first.

    Case does not matter, nor whether words are joined by `-` or `_`.

    Args:
        given: What was typed.
        known: The names there are.
        count: Names to return at most.
        cutoff: Least resemblance, 0 to 1.
    """
    plain = {_plain(name): name for name in known}
    return [plain[name] for name in difflib.get_close_matches(_plain(given), plain, n=count, cutoff=cutoff)]


def near_divisors(given: int, *numbers: int) -> str:
    """Return the common divisors of `numbers` on both sides of `given`, as a remedy says them: `2 or 4`."""
    common = [d for d in range(1, min(numbers) + 1) if not any(number % d for number in numbers)]
    near = [*[d for d in common if d <= given][-1:], *[d for d in common if d > given][:1]]
    return " or ".join(map(str, near))


def near_multiples(given: int, unit: int) -> str:
    """Return the multiples of `unit` around `given`, as a remedy says them: `4096 or 8192`."""
    below = given // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
