"""Parameter rules: how fast, with what decay, and whether at all the parameters of a model are trained.

Names are those of the plain model (`clean_name`): what wrappers and adapters insert is no part of them, so a rule
means the same parameter under every engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from leanmill.core.errors import ConfigError


if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ParamSettings:
    """How the optimizer treats a parameter; what is None is as the recipe's optimizer section says."""

    lr_factor: float | None = None
    """The peak learning rate as a multiple of `optimizer.lr`."""
    weight_decay: float | None = None
    """Decoupled weight decay, also of what gets none by default (norms, biases, scales)."""
    betas: tuple[float, float] | None = None
    """Decay of the optimizer's moments."""
    pull: Literal["update", "weight"] | None = None
    """Keep an element-wise `pull` in the optimizer's state, which a step rule writes. AdamW adds it to its first
    moment before it divides (`update`), or moves the weight by -lr pull beside its own step (`weight`)."""
    kept: int | None = None
    """Keep so many element-wise tensors `kept_0`, `kept_1`, ... in the optimizer's state, which a step rule writes and
    the optimizer leaves alone: what a rule gathers over steps is sharded, saved and resumed with the moments."""

    @property
    def num_written(self) -> int:
        """Tensors like the parameter that step rules write in the optimizer's state."""
        return (self.pull is not None) + (self.kept or 0)


PLAIN = ParamSettings()
"""As the recipe's optimizer section says."""


@dataclass(frozen=True, kw_only=True)
class ParamRule:
    """What one technique says of the parameters that `match` names.

    Rules do not take precedence over each other: two that say different things of one parameter are refused,
    and so the order in which a recipe lists its techniques does not matter.
    """

    technique: str
    """Who says it, for messages."""
    match: Callable[[str], bool]
    """By the parameter's name in the plain model, e.g. `model.layers.0.mlp.up_proj.weight`."""
    settings: ParamSettings = PLAIN
    trainable: bool | None = None
    """False freezes; True trains also what another technique's `freeze_base` freezes; None says nothing."""


class TrainableSchedule(ABC):
    """Which of the parameters that may train do train in a step; the others rest, without gradient and state.

    A pure function of the step, equal on all ranks, so a run resumed at any step needs nothing saved. Names are
    those of the plain model, and a technique asks for a subset of what the recipe leaves trainable.
    """

    technique: str
    """Who asks, for messages."""
    every_steps: int
    """Steps for which a set stays, counted from step 0."""

    @abstractmethod
    def trained(self, names: Collection[str], step: int) -> set[str]:
        """Return those of `names` that train in optimizer step `step`, from 0."""

    @abstractmethod
    def heaviest(self, sizes: Mapping[str, int]) -> set[str]:
        """Return the largest set that some step may train, given elements by name; for predicting memory."""


def settings_by_name(rules: Sequence[ParamRule], names: Iterable[str]) -> dict[str, ParamSettings]:
    """Return the settings of every parameter that a rule has something to say of.

    Raises:
        ConfigError: Two rules differ about one parameter; the message names both techniques.
    """
    found = {}
    for name in names:
        matching = [rule for rule in rules if rule.match(name)]
        said: dict[str, Any] = {
            key: _agreed(key, name, [(rule.technique, getattr(rule.settings, key)) for rule in matching])
            for key in _KEYS
        }
        if any(value is not None for value in said.values()):
            found[name] = ParamSettings(**said)
    return found


def apply_trainable(
    rules: Sequence[ParamRule], named_parameters: Iterable[tuple[str, nn.Parameter]], frozen: Collection[int]
) -> None:
    """Set which parameters train.

    Args:
        rules: Of all techniques.
        named_parameters: Names in the plain model, each parameter once.
        frozen: Ids of parameters that rest where no rule says that they train.

    Raises:
        ConfigError: Two rules differ about one parameter; the message names both techniques.
    """
    for name, parameter in named_parameters:
        said = _agreed("trainable", name, [(rule.technique, rule.trainable) for rule in rules if rule.match(name)])
        if said is None and id(parameter) in frozen:
            said = False
        # Masks are bool and never train.
        if said is not None and (parameter.is_floating_point() or not said):
            parameter.requires_grad_(said)


_KEYS = ("lr_factor", "weight_decay", "betas", "pull", "kept")


def _agreed(key: str, name: str, claims: Sequence[tuple[str, Any]]) -> Any:
    """Return the one value that is claimed; None where nobody claims any."""
    claims = [(technique, value) for technique, value in claims if value is not None]
    if not claims:
        return None
    first, value = claims[0]
    for other, claimed in claims[1:]:
        if claimed != value:
            raise ConfigError(
                f"{first} sets {key} of {name} to {value}, {other} sets it to {claimed}; remove one of the two "
                f"techniques, or give them different `targets`"
            )
    return value
