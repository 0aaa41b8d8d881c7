"""From `model.moe` to the `model.config` of a family that can be built so. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.models.expert_sizes import NUM_EXPERTS
from leanmill.models.mixture.config import MixtureConfig
from leanmill.models.mixture.families import FAMILIES, Family
from leanmill.models.mixture.shape import Shape, shape_of


_NUMBERS = (*NUM_EXPERTS, "num_experts_per_tok")
"""What families also call numbers that `model.moe` says."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture of experts as a family writes it."""

    config: dict[str, Any]
    """As `model.config`, `model_type` included."""
    family: Family
    why: str
    """Why this family."""
    shape: Shape

    def lines(self) -> list[str]:
        """Return it in words: family, experts, weights."""
        shape = self.shape
        return [f"{self.family.model_type} ({self.family.words}): {self.why}", _experts(shape), _weights(shape)]


def translate(moe: MixtureConfig, config: Mapping[str, Any]) -> Mixture:
    """Return the family and configuration of `model.moe` beside `model.config`.

    Args:
        moe: The section.
        config: `model.config`; its `model_type` may be missing, and then the first family that fits is taken.

    Raises:
        ConfigError: The numbers do not fit each other, or no family has all of them; the message names the
            nearest that can be built.
    """
    shape = shape_of(moe, config)
    family, why = _choose(shape, config.get("model_type"))
    settings = family.written(shape)
    twice = [key for key in (*settings, *_NUMBERS) if key in config and key != "intermediate_size"]
    if twice:
        raise ConfigError(f"model.config.{twice[0]} says what model.moe says; remove it from model.config")
    defaults = dict(family.defaults)
    if isinstance(family.normalises, str):
        defaults[family.normalises] = shape.top_k > 1
        if shape.top_k == 1 and config.get(family.normalises):
            raise ConfigError(
                f"model.config.{family.normalises}=true makes the weight of one chosen expert always 1, so that the "
                f"router would learn nothing; remove it, or give a larger model.moe.top_k or granularity"
            )
    merged = defaults | dict(config) | settings | {"model_type": family.model_type}
    return Mixture(config=merged, family=family, why=why, shape=shape)


def _choose(shape: Shape, model_type: Any) -> tuple[Family, str]:
    """Return the family and why it is taken."""
    if model_type is None:
        chosen = next((family for family in FAMILIES if not any(family.lacks(shape))), None)
        if chosen is None:
            raise ConfigError(f"model.moe: no family has all of this; {_nearest(shape)}")
        missing = next((what for what, _ in FAMILIES[0].lacks(shape)), None)
        why = f"{FAMILIES[0].model_type} has no {missing}" if missing else "it has all that is asked for"
        return chosen, why
    known = {family.model_type: family for family in FAMILIES}
    if model_type not in known:
        raise ConfigError(
            f"model.config.model_type={model_type!r} is none that model.moe builds; remove it, or give one of "
            f"{', '.join(known)}"
        )
    lacking = list(known[model_type].lacks(shape))
    if lacking:
        what, instead = lacking[0]
        able = [family.model_type for family in FAMILIES if not any(family.lacks(shape))]
        others = f", or model.config.model_type={able[0]}" if able else f"; {_nearest(shape)}"
        raise ConfigError(f"model.moe: {model_type} has no {what}; set {instead}{others}")
    return known[model_type], "model.config.model_type says so"


def _nearest(shape: Shape) -> str:
    family = min(FAMILIES, key=lambda family: len(list(family.lacks(shape))))
    lacking = list(family.lacks(shape))
    missing, instead = " and no ".join(w for w, _ in lacking), " and ".join(i for _, i in lacking)
    return f"the nearest, {family.model_type}, has no {missing}: set {instead}"


def _experts(shape: Shape) -> str:
    counts = " to ".join(str(count) for count in dict.fromkeys(shape.num_routed))
    shared = f" and {shape.num_shared} shared" if shape.num_shared else ""
    residual = f", a residual MLP of width {shape.dense_size}" if shape.has_residual else ""
    where = f"{len(shape.layers)} of {shape.num_layers} layers"
    return f"{counts} experts of width {shape.expert_size}, a token uses {shape.top_k}{shared}{residual}; in {where}"


def _weights(shape: Shape) -> str:
    used, total, num_layers = shape.active_weights, sum(shape.expert_weights), len(shape.layers)
    residual = f" + {shape.dense_size}" if shape.has_residual else ""
    return (
        f"weights of experts that a token uses: 3 x {shape.hidden_size} x ({shape.expert_size} x "
        f"{shape.top_k + shape.num_shared}{residual}) = {used:,} a layer, {used * num_layers:,} in all, of {total:,}"
    )
