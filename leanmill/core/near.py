"""Names that a mistyped one may have meant. Imports no torch."""

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


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
