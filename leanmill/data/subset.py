"""A share of the rows: the same ones throughout, or others in each round."""

from __future__ import annotations

from leanmill.data.config import SubsetConfig
from leanmill.data.orders import Shuffle


_FAR = 1 << 41
"""From the numbers of the shuffles that rows are put in order with."""


class RowSubset:
    """From the number of a row that is handed out to the number of the row it is, which nothing else decides.

    Args:
        config: The share, and how it is drawn.
        seed: Of the order.
    """

    def __init__(self, config: SubsetConfig, seed: int) -> None:
        self._config, self._seed = config, seed
        self._orders: dict[tuple[int, int], Shuffle] = {}

    def rows(self, per_pass: int) -> int:
        """Return the rows of a round, at least one.

        Args:
            per_pass: Rows that a source has.
        """
        return max(1, int(self._config.share * per_pass))

    def number(self, number: int, per_pass: int, source: int) -> int:
        """Return the number of the source's row that is handed out as its `number`-th.

        Rows of a source come in an order that is drawn anew in every pass, so the first of a pass are a random subset.

        Args:
            number: From 0.
            per_pass: Rows that the source has.
            source: Which one, so that no two are read in the same order.
        """
        if self._config.draw == "without_replacement":
            return number
        round_number, place = divmod(number, self.rows(per_pass))
        if self._config.draw == "with_replacement":
            return round_number * per_pass + place
        return self._order(source, round_number, self.rows(per_pass))[place]

    def passes(self, num_rows: float, per_pass: int) -> float:
        """Return how often a run of so many rows of a source goes through each row that it reads."""
        return num_rows / (self.rows(per_pass) if self._config.draw == "once" else per_pass)

    def describe(self) -> str:
        """For the log."""
        drawn = {"once": "the same throughout", "with_replacement": "drawn anew from all of them each round"}
        how = drawn.get(self._config.draw, "others each round until all had their turn")
        return f"{self._config.share:.3g} of the rows a round, {how}"

    def _order(self, source: int, round_number: int, size: int) -> Shuffle:
        key = (source, round_number)
        if key not in self._orders:
            for old in [one for one in self._orders if one[0] == source and one[1] < round_number - 1]:
                del self._orders[old]
            self._orders[key] = Shuffle(size, (self._seed << 8) + source, _FAR + round_number)
        return self._orders[key]
