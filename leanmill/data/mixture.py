"""Which source each row of a weighted mixture comes from."""

from __future__ import annotations

from collections.abc import Sequence

from leanmill.data.orders import permutation


class MixtureSchedule:
    """Assigns rows to sources so that every prefix has the right proportions within one row.

    The assignment of Tijdeman 1980, "The chairman assignment problem": among the sources that are
    not ahead of their share, the one that would fall behind first. After n rows every source i has
    had n * w_i rows, give or take 1 - 1 / (2k - 2) of a row with k sources. It depends on the
    weights, the seed (which only decides ties) and the counts so far.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = sum(weights)
        self._weights = [weight / total for weight in weights]
        self._order = permutation(len(weights), seed, 0).tolist()
        self.counts = [0] * len(weights)
        """Rows each source has had."""

    def next(self) -> tuple[int, int]:
        """Return (source, number of the row within the source) of the next row."""
        source = self._next_source()
        number = self.counts[source]
        self.counts[source] += 1
        return source, number

    def _next_source(self) -> int:
        num_sources = len(self._weights)
        if num_sources == 1:
            return 0
        slack = 1 / (2 * num_sources - 2)
        row = sum(self.counts) + 1
        best, earliest = self._order[0], float("inf")
        for source in self._order:
            behind = self._weights[source] * row - self.counts[source]
            deadline = (1 - slack - behind) / self._weights[source]
            # A rounding error must not rule out a source that is due exactly now.
            if behind >= slack - 1e-9 and deadline < earliest:
                best, earliest = source, deadline
        return best
