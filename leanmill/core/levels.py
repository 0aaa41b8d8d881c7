"""Levels: for each part of a model one of several ways to compress it, under a budget. Imports no torch.

A search pass gives every unit (a linear layer, or the attention or MLP of a block) one level of the same list: what a
layer pass makes of it, the weights as they are, or nothing at all. It sees the model through a `Judge`, never the
trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.passes import InputStatistics, LayerPassConfig, LayerSolver, PassConfig, Solution
from leanmill.core.registry import parse_pass


if TYPE_CHECKING:
    from torch import Tensor


DENSE_BITS = 16.0
"""Bits of a weight that is left as it is, whatever it is stored in: what sizes are held against."""

State = tuple[int, ...]
"""The level of each unit, 0 the smallest."""


@dataclass(frozen=True)
class Space:
    """What a search chooses from."""

    costs: tuple[tuple[int, ...], ...]
    """Bits of each unit at each of its levels, strictly rising."""
    budget: int
    """Bits of all units together, at most; between what they take at their smallest and at their largest levels."""

    @property
    def num_levels(self) -> int:
        """How many levels there are, the same for every unit."""
        return len(self.costs[0])

    def cost(self, state: Sequence[int]) -> int:
        """Return the bits of all units together."""
        return sum(costs[level] for costs, level in zip(self.costs, state, strict=True))


class Judge(Protocol):
    """The model, as a search may ask it."""

    def losses(self, candidates: Sequence[Sequence[int | None]], *, num_tokens: int, draw: str) -> list[float]:
        """Return what each candidate loses: the mean of KL(dense || compressed) over tokens, in nats.

        Args:
            candidates: A level for each unit; None leaves it as it was.
            num_tokens: Of calibration text, rounded down to whole rows, at least one; the same for all candidates.
            draw: Rows are drawn by a hash of it.
        """
        ...

    def layer_errors(self) -> list[list[float]]:
        """Return for each unit and level the mean over its layers of ||(W' - W) X||^2 / ||W X||^2.

        X are the layer's inputs on calibration text in the dense model.
        """
        ...

    def recall(self) -> dict[str, Any] | None:
        """Return what was remembered last in a search of these very settings; None in a new one."""
        ...

    def remember(self, found: dict[str, Any]) -> None:
        """Keep a JSON-able state of the search, in place of what was kept before."""
        ...


class LevelSearch(Protocol):
    """Chooses the level of each unit."""

    def run(self, space: Space, judge: Judge) -> State:
        """Return levels within the budget; every rank calls this, and finds the same."""
        ...


@dataclass(frozen=True)
class Scaled:
    """A `LayerSolver` that multiplies every weight by one factor."""

    factor: float
    needs_gram = False

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Every weight fits."""

    def prepare(self, statistics: InputStatistics) -> Callable[[Tensor], Solution]:
        """See `LayerSolver`."""
        return lambda weight: Solution(weight=weight.mul_(self.factor))


class Dense(LayerPassConfig):
    """A level: the weights as they are."""

    type: Literal["dense"] = "dense"
    """Name of the level."""

    @property
    def bits_per_weight(self) -> float:
        return DENSE_BITS

    def solver(self) -> LayerSolver:
        return Scaled(1.0)


class Drop(LayerPassConfig):
    """A level: zeros for every weight and bias, so that only the residual stream passes."""

    type: Literal["drop"] = "drop"
    """Name of the level."""

    @property
    def bits_per_weight(self) -> float:
        return 0.0

    def solver(self) -> LayerSolver:
        return Scaled(0.0)


def parse_level(raw: Any) -> LayerPassConfig:
    """Turn one entry of `levels` into its configuration: `dense`, `drop` or a layer pass.

    Raises:
        ConfigError: It is none, or takes a choice of layers, which belongs to the search.
    """
    name = raw.get("type") if isinstance(raw, dict) else raw
    if isinstance(raw, str):
        raw = {"type": raw}
    if name in ("dense", "drop"):
        config: PassConfig = (Dense if name == "dense" else Drop).model_validate(raw)
    else:
        config = parse_pass(raw)
    if not isinstance(config, LayerPassConfig) or config.bits_per_weight is None:
        raise ConfigError(
            f"levels: {name!r} is no level of a layer; give dense, drop, or a pass over linear layers whose bits are "
            f"known, e.g. {{type: gptq, weight_bits: 3}} or {{type: sparsegpt, sparsity: 0.5}}"
        )
    if config.counts_tokens_by is not None:
        raise ConfigError(
            f"levels: {name} does not count all tokens alike, and levels are solved on plain inputs; type tokens: equal"
        )
    if config.targets is not None or config.exclude:
        raise ConfigError(f"levels: {name} has targets or exclude; set them beside levels, where they hold for all")
    return config


class SearchConfig(PassConfig):
    """Base of passes that choose a level for each unit."""

    says_how_long: ClassVar[frozenset[str]] = frozenset()
    """Fields that say for how long a search goes on, and nothing of how: what it remembers serves any of them."""
    levels: list[Annotated[SerializeAsAny[PassConfig], BeforeValidator(parse_level)]] = Field(min_length=2)
    """What a unit may become, in any order: `dense`, `drop`, and layer passes such as `{type: gptq, weight_bits: 3}`;
    no two of one size."""
    unit: Literal["layer", "part"] = "layer"
    """`layer`: each linear layer has a level of its own. `part`: the linear layers of the attention, or of the MLP, of
    a block share one; `drop` needs it."""
    targets: list[str] | None = None
    """Patterns of weights to take; None takes every linear weight of the decoder blocks."""
    exclude: list[str] = Field(default_factory=list)
    """Patterns of weights to leave out again."""
    sparsity: float | None = Field(default=None, gt=0, lt=1)
    """The budget as the share of these weights that goes; give this or `average_bits`."""
    average_bits: float | None = Field(default=None, gt=0, lt=DENSE_BITS)
    """The budget as bits a weight on average, of 16; scales and indices do not count."""
    work_dir: str | None = None
    """Where levels are kept, and how far the search is: the same command goes on there, and searches with other
    budgets find the levels made. None is the output's name with `.search`."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.sparsity is None) == (self.average_bits is None):
            raise ConfigError(
                f"a search has one budget, got sparsity={self.sparsity} and average_bits={self.average_bits}; set one "
                f"of them, e.g. sparsity: 0.5 or average_bits: 3"
            )
        bits = self.sorted_bits
        for small, large in zip(bits, bits[1:], strict=False):
            if small == large:
                raise ConfigError(f"levels: two of them take {small:g} bits a weight; leave one out")
        if bits[0] == 0 and self.unit == "layer":
            raise ConfigError("levels: drop takes away the attention or MLP of a block; set unit: part with it")
        if not bits[0] <= self.budget_bits < bits[-1]:
            raise ConfigError(
                f"the budget is {self.budget_bits:g} bits a weight, and levels take {bits[0]:g} to {bits[-1]:g}; give "
                f"a level at most as large and one that is larger"
            )
        return self

    @property
    def budget_bits(self) -> float:
        """Bits a weight on average, at most."""
        return self.average_bits if self.average_bits is not None else DENSE_BITS * (1 - (self.sparsity or 0.0))

    @property
    def sorted_levels(self) -> list[LayerPassConfig]:
        """The levels from the smallest to the largest."""
        found = [level for level in self.levels if isinstance(level, LayerPassConfig)]
        return sorted(found, key=lambda level: level.bits_per_weight or 0.0)

    @property
    def sorted_bits(self) -> list[float]:
        """Bits of a weight at each of them."""
        return [level.bits_per_weight or 0.0 for level in self.sorted_levels]

    @property
    def aimed_levels(self) -> list[LayerPassConfig]:
        """The same, each with the layers that the search takes."""
        aim = {"targets": self.targets, "exclude": self.exclude}
        return [level.model_copy(update=aim) for level in self.sorted_levels]

    def search(self, seed: int) -> LevelSearch:
        """Return what chooses.

        Args:
            seed: The recipe's, for what is drawn.
        """
        raise NotImplementedError

    @property
    def most_tokens(self) -> int:
        """Tokens of calibration text that a candidate is judged on at most."""
        raise NotImplementedError


def described(level: LayerPassConfig) -> str:
    """Return a level in a few words: `sparsegpt sparsity=0.5`."""
    options = level.model_dump(mode="json", exclude={"type"}, exclude_defaults=True)
    return " ".join([str(level.type), *(f"{key}={value}" for key, value in options.items())])  # type: ignore[attr-defined]
