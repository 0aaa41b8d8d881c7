"""What of a recipe may change between a checkpoint and its resume: one table. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.redact import redact_tree
from leanmill.core.secrets import shown
from leanmill.recipe.earlier import as_meant, going_on
from leanmill.recipe.io import validate_recipe
from leanmill.recipe.root import Recipe


UNSAID = ("checkpoint.accept_changes", "checkpoint.resume")
"""How a resume is asked for; no property of the run."""
FREE = (
    # Where and how it is computed, and what is written: the same maths up to rounding.
    "name", "run_dir", "device", "engine", "layout", "eval", "checkpoint", "log", "cluster",
    "batch.tokens_per_micro_batch", "train.activation_checkpointing", "train.compile", "train.deterministic",
    "train.logits_chunk_tokens", "model.attention",
    # Checks, which change nothing that passes them.
    "model.trust_remote_code", "model.max_context",
    # What only the steps to come can tell: the length, and what a step that would have ended the run does.
    "train.steps", "train.total_tokens", "train.epochs", "train.non_finite", "train.spike",
    # The data compares itself, by what it holds (`leanmill.data.identity`): what it lets pass is harmless.
    "data", "seed",
)  # fmt: skip
"""Keys, or sections whole, that may change; the run says so. Every other key, a new one too, must be accepted."""
BOUND = ("layout.low_comm.",)
"""What lies in one of them and must be accepted all the same."""
FREE_AGAIN = ("layout.low_comm.workers", "layout.low_comm.patience_seconds")
"""What of that may change after all."""
_NOT_SET = "not set"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key of a recipe that is not as it was."""

    key: str
    """As a person types it; a technique goes by its type, e.g. `techniques.ternary`."""
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.key} {self.old} -> {self.new}"


def changes(saved: Mapping[str, Any], recipe: Recipe) -> list[Change]:
    """Return what differs between the recipe in a checkpoint and this one.

    Args:
        saved: The checkpoint's `recipe.json`; keys that did not exist yet count at what was done
            then (`leanmill.recipe.earlier`), or at their defaults.
        recipe: The recipe that resumes, resolved the same way.
    """
    saved, recipe = as_meant(saved), going_on(saved, recipe)
    try:
        before = validate_recipe(dict(saved), source="recipe.json").model_dump(mode="json")
    except ConfigError:  # of a version with other keys: compared as it stands
        before = dict(saved)
    found = _differences(_by_type(redact_tree(before)), _by_type(redact_tree(recipe.model_dump(mode="json"))), "")
    return [change for change in found if not _covers(UNSAID, change.key)]


def side_by_side(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the keys in which recipes are not all alike, each with its value in every one of them, as text.

    Args:
        recipes: Resolved, as runs write them; where they lie and what they are called is left out.
    """
    named = [_by_type(redact_tree(dict(recipe))) for recipe in recipes]
    keys = dict.fromkeys(change.key for other in named[1:] for change in _differences(named[0], other, ""))
    return {
        key: [_shown(key.rpartition(".")[2], _at(recipe, key)) for recipe in named]
        for key in keys
        if not _covers(("name", "run_dir", *UNSAID), key)
    }


def _at(recipe: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(recipe, dict) or part not in recipe:
            return _NOT_SET
        recipe = recipe[part]
    return recipe


def check_accepted(found: Sequence[Change], accepted: Sequence[str], checkpoint: str) -> None:
    """Refuse changes that make the run another one than it was, unless they were accepted.

    Args:
        found: What `changes` returned.
        accepted: `checkpoint.accept_changes`: keys, or the sections they lie in.
        checkpoint: What resumes, for the message.

    Raises:
        ConfigError: Some were not; it lists them and says what to type.
    """
    refused = [change for change in found if not is_accepted(change, accepted)]
    if refused:
        keys = ",".join([*accepted, *(change.key for change in refused)])
        raise ConfigError(
            f"{checkpoint} was trained otherwise than this recipe says: {'; '.join(map(str, refused))}. Put the old "
            f"values back (they stand in its recipe.json), give another run_dir, or type "
            f"'checkpoint.accept_changes=[{keys}]' to go on with the new ones"
        )


def is_accepted(change: Change, accepted: Sequence[str], *, free: Sequence[str] = FREE) -> bool:
    """Whether a change lies in one of the keys or sections that were accepted, or that need no acceptance."""
    is_bound = change.key.startswith(BOUND) and not _covers(FREE_AGAIN, change.key)
    return (_covers(free, change.key) and not is_bound) or _covers(accepted, change.key)


def _covers(keys: Sequence[str], key: str) -> bool:
    return any(key == known or key.startswith(f"{known}.") for known in keys)


def _by_type(dump: dict[str, Any]) -> dict[str, Any]:
    """Name techniques by their type, since their order does not matter."""
    named: dict[str, Any] = {}
    for technique in dump.get("techniques") or []:
        name = kind = str(technique.get("type"))
        number = 1
        while name in named:
            number += 1
            name = f"{kind}-{number}"
        named[name] = technique
    return {**dump, "techniques": named}


def _differences(old: Any, new: Any, path: str) -> Iterator[Change]:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            key = path.rpartition(".")[2]
            yield Change(key=path, old=_shown(key, old), new=_shown(key, new))
        return
    keys = dict.fromkeys([*old, *new])
    if old.get("type") != new.get("type"):
        # Of another kind: that says it, its own keys have no counterpart.
        keys = {key: None for key in keys if key in old and key in new}
    for key in keys:
        yield from _differences(old.get(key, _NOT_SET), new.get(key, _NOT_SET), f"{path}.{key}" if path else key)


def _shown(key: str, value: Any) -> str:
    return _NOT_SET if value == _NOT_SET else "null" if value is None else shown(key, value)
