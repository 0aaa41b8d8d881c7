"""Phases of a run: passes over its model, training with other settings, and what each begins with. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.core.passes import PassConfig
from leanmill.core.registry import parse_pass
from leanmill.core.secrets import shown
from leanmill.recipe.compress import CalibrationConfig
from leanmill.recipe.yaml_source import MAX_DEPTH


BASE = "base"
"""In `start_from`: the model of the recipe itself."""
OF_PHASE = "phase:"
"""Before the name of an earlier phase, where a technique, a pass or `score` names a model: what that phase leaves."""
FRESH = "fresh"
"""In `rewind_to`: weights drawn anew."""


def nested(value: Any) -> Any:
    """Turn dotted keys of `overrides` into sections; what is written later wins."""
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, item in value.items():
        *sections, leaf = str(key).split(".")
        if len(sections) >= MAX_DEPTH:
            raise ConfigError(f"overrides: a key has {len(sections) + 1} levels; a recipe needs about six")
        inner = {leaf: nested(item)}
        for section in reversed(sections):
            inner = {section: inner}
        found = merged(found, inner)
    return found


def merged(base: Any, changes: Any) -> Any:
    """Return `base` with `changes` written over it: mapping into mapping, anything else in place of what was there.

    A mapping whose `type` becomes another replaces the whole mapping, since the keys of the old type
    mean nothing to the new one. A number for a key takes that place of a list; the one past its end appends.
    """
    if not isinstance(changes, Mapping):
        return changes
    if isinstance(base, list) and changes and all(key.isdecimal() for key in changes):
        items = list(base)
        for key, value in changes.items():
            place = int(key)
            if place > len(items):
                raise ConfigError(f"place {place} of a list of {len(items)}; type 0 to {len(items)}")
            items[place : place + 1] = [merged(items[place] if place < len(items) else {}, value)]
        return items
    if not isinstance(base, Mapping) or ("type" in changes and changes["type"] != base.get("type")):
        base = {}
    return {**base, **{key: merged(base.get(key), value) for key, value in changes.items()}}


def with_models_of_phases(raw: Any, path_of: Callable[[str], str]) -> Any:
    """Return settings of techniques with every `phase:name` in them replaced by `path_of(name)`."""
    if isinstance(raw, str):
        return path_of(raw.removeprefix(OF_PHASE)) if raw.startswith(OF_PHASE) else raw
    if isinstance(raw, Mapping):
        return {key: with_models_of_phases(value, path_of) for key, value in raw.items()}
    return [with_models_of_phases(one, path_of) for one in raw] if isinstance(raw, list) else raw


class ScoreConfig(Config):
    """Two models whose difference says which documents are trained on."""

    method: Literal["miniplm", "paser"] = "miniplm"
    """`miniplm` scores text by what a teacher finds easier than a small reference (Gu et al. 2024, arXiv:2410.17215).
    `paser` chooses text or conversations on which a pruned model lost most, group by group (He et al. 2025,
    arXiv:2502.12594), to recover it."""
    teacher_model: str
    """Folder of the model to learn from, or `phase:NAME`, what an earlier phase left; with `paser` the model before it
    was pruned."""
    reference_model: str
    """Folder of a small model that was trained on a sample of the text, or `phase:NAME`; with `paser` the pruned
    model."""
    kept_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a domain's tokens that its best documents have together; with `paser` the most of its documents that are
    chosen, as a share."""
    num_clusters: int | None = Field(default=None, ge=1)
    """With `paser`, groups of like documents that share the budget by what was lost in them, at most; None is 10."""

    @model_validator(mode="after")
    def _has_groups(self) -> Self:
        if self.num_clusters is not None and self.method != "paser":
            raise ValueError("num_clusters: groups are of method: paser; set that, or remove it")
        return self

    @property
    def tasks(self) -> tuple[str, ...]:
        """What data may be prepared for."""
        return ("pretrain", "sft") if self.method == "paser" else ("pretrain",)

    @property
    def models(self) -> dict[str, str]:
        """The two models, by what each is."""
        return {"teacher": self.teacher_model, "reference": self.reference_model}

    @property
    def groups(self) -> int:
        """At most."""
        return 10 if self.num_clusters is None else self.num_clusters

    @property
    def written(self) -> dict[str, Any]:
        """What decides the scores that are written; `miniplm` takes the share of them later."""
        found = {"method": self.method, "teacher_model": self.teacher_model, "reference_model": self.reference_model}
        return found | ({"kept_share": self.kept_share, "num_clusters": self.groups} if self.method == "paser" else {})


class PhaseConfig(Config):
    """One phase: passes over a model, then training, or one of the two."""

    name: str | None = None
    """Name of the phase, for its folder and for `start_from`; None is `train`, or the names of its passes."""
    start_from: str | None = None
    """What it begins with: the name of an earlier phase, `name@step` for a checkpoint within one, or `base` for
    the model of the recipe. None is the phase before, and `base` for the first."""
    carry: Literal["auto", "weights", "state"] = "auto"
    """What it takes from there. `weights` is the model as an export writes it: every technique folded, in fp32.
    `state` is the checkpoint itself: the weights below masks and quantisers, and what stages learned. `auto` is
    `state` where the techniques are the same and no pass comes between, else `weights`."""
    keep: list[Literal["optimizer", "data"]] = Field(default_factory=list)
    """What goes on besides the model: `optimizer` its moments (with `carry: state`), `data` the position in the
    data. What is not kept starts afresh, as in a run of its own."""
    passes: list[Annotated[SerializeAsAny[PassConfig], BeforeValidator(parse_pass)]] = Field(default_factory=list)
    """Passes over the model it begins with, each `{type: name, ...}`, in the order they run."""
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    """Rows that the passes look at, of `data`."""
    rewind_to: str | None = None
    """After the passes, give all weights the values they had in an earlier phase, `name` or `name@step`, but for the
    zeros of the layers that the passes took: a lottery ticket (Frankle and Carbin 2019, arXiv:1803.03635). `fresh`
    draws them anew as the model's family does, from a seed of the phase: the paper's control."""
    score: ScoreConfig | None = None
    """Before it trains, score the documents of `data`, which is prepared text, by a teacher against a reference, as
    `leanmill data score` does; it then trains on the best of them."""
    overrides: Annotated[dict[str, Any] | None, BeforeValidator(nested)] = None
    """What is otherwise than in the recipe while this phase trains: `{train.steps: 100, techniques: [...]}`, dotted
    or nested; a list replaces the whole list. A phase with passes trains only where this is given, `{}` too."""

    @field_validator("name")
    @classmethod
    def _is_a_folder_name(cls, name: str | None) -> str | None:
        bad = name is not None and (
            not name.strip() or not name.isprintable() or set(name) & set("/@{}") or name[0] == "."
        )
        if bad or name in (BASE, FRESH) or len((name or "").encode()) > 100:
            raise ConfigError(
                f"name={shown('name', name)} must be a short folder name without /, @ and braces, other than {BASE!r} "
                f"and {FRESH!r}; type e.g. name: prune"
            )
        return name

    @property
    def trains(self) -> bool:
        """Whether it has a stretch of training, after its passes where it has some."""
        return not self.passes or self.overrides is not None

    @property
    def kind(self) -> str:
        """What it does, as a name: its passes, or `train`."""
        return "-".join(str(config.type) for config in self.passes) or "train"  # type: ignore[attr-defined]


def has_own_model(phases: Sequence[PhaseConfig], index: int) -> bool:
    """Whether a phase may train another model than the recipe's: one that begins with no model of before."""
    return source_of(phases, index)[0] is None and not phases[index].passes


def phase_names(phases: Sequence[PhaseConfig]) -> list[str]:
    """Return the phases' names; one that was not given gets a number where it is taken."""
    taken = [phase.name for phase in phases if phase.name is not None]
    names: list[str] = []
    for phase in phases:
        name, number = phase.name or phase.kind, 1
        while phase.name is None and name in (*taken, *names):
            number += 1
            name = f"{phase.kind}-{number}"
        names.append(name)
    return names


def trained_before(phases: Sequence[PhaseConfig], index: int) -> tuple[int | None, int | None]:
    """Return the nearest phase that trained among those a phase comes from, and the step in it, as `source_of` does."""
    source, step = source_of(phases, index)
    while source is not None and not phases[source].trains:
        source, step = source_of(phases, source)
    return source, step


def carries_state(phases: Sequence[PhaseConfig], index: int, *, same_techniques: bool) -> bool:
    """Whether a phase begins with the checkpoint itself, rather than with the folded model.

    Args:
        phases: All phases.
        index: Which.
        same_techniques: Whether it trains with the techniques of the phase it starts from.
    """
    phase, (source, _) = phases[index], source_of(phases, index)
    is_possible = source is not None and phases[source].trains and phase.trains and not phase.passes
    return is_possible and (phase.carry == "state" or (phase.carry == "auto" and same_techniques))


def source_of(phases: Sequence[PhaseConfig], index: int) -> tuple[int | None, int | None]:
    """Return the index of the phase that one starts from (None: the recipe's model), and the step (None: its end)."""
    start = phases[index].start_from
    if start is None:
        return (index - 1 if index else None), None
    return (None, None) if start == BASE else place_of(phases, start)


def place_of(phases: Sequence[PhaseConfig], place: str) -> tuple[int, int | None]:
    """Return the index of the phase that `name` or `name@step` names, and the step (None: its end)."""
    name, at, step = place.partition("@")
    return phase_names(phases).index(name), int(step) if at else None


def places_asked_for(phases: Sequence[PhaseConfig], index: int) -> list[tuple[int | None, int | None]]:
    """Return every phase that one takes weights from, and the step in it."""
    rewound = phases[index].rewind_to
    return [source_of(phases, index), *([] if rewound in (None, FRESH) else [place_of(phases, rewound)])]
