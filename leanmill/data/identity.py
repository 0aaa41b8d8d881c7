"""What decides which rows come in which order, and what to say where two runs differ in it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from leanmill.core.config import Config
from leanmill.core.errors import ConfigError
from leanmill.data.cache import fingerprint
from leanmill.data.config import DataConfig, HfDataset, Prepared


HARMLESS: Mapping[type, frozenset[str]] = {
    # The tokenizer itself is compared, wherever it came from; `long_documents` is compared resolved.
    DataConfig: frozenset({"cache_dir", "tokenizer", "long_documents"}),
    # Files may move; what they hold is compared.
    HfDataset: frozenset({"path"}),
    Prepared: frozenset({"path", "scores"}),
}
"""Fields that may change between a checkpoint and its resume. Any other field, a new one too, may not."""
MOVABLE: Mapping[type, frozenset[str]] = {HfDataset: frozenset({"validation_path"})}
"""Fields of which it counts whether there is one: its files may move, and what they hold is compared."""
_MOVABLE_NAMES = frozenset().union(*MOVABLE.values())


@dataclass(frozen=True)
class Identity:
    """Equal identities give equal rows."""

    settings: Mapping[str, Any]
    """By the key that a person types, e.g. `data.source.split`; JSON-able."""
    content: Mapping[str, str]
    """Fingerprints of what was read, by what a person calls it, e.g. `tokenizer`."""
    held_out: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of held-out text that files of its own hold; no training row depends on it."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of `settings`: what a checkpoint written before a field existed was trained with."""

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the rows."""
        settings = {key: "files" if value and _is_movable(key) else value for key, value in self.settings.items()}
        return fingerprint({"settings": settings, "content": dict(self.content)})

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON-able."""
        return {"settings": dict(self.settings), "content": dict(self.content), "held_out": dict(self.held_out)}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Compare with the `state` of a checkpoint.

        Raises:
            ConfigError: They differ; the message says in what, and what to type.
        """
        sections = {_section(key) for key in saved["settings"]}
        defaults = {key: value for key, value in self.defaults.items() if _section(key) in sections}
        settings = _without_children_of_types(_differing(self.settings, {**defaults, **saved["settings"]}))
        content = _differing(self.content, saved["content"])
        # Of a checkpoint from before it was noted nothing is known.
        content |= {
            name: found for name, found in _differing(self.held_out, saved.get("held_out", {})).items() if all(found)
        }
        if settings or content:
            both = {**settings, **content}
            pairs = [f"{key} (checkpoint {_shown(a)}, recipe {_shown(b)})" for key, (a, b) in both.items()]
            raise ConfigError(
                f"the checkpoint was trained on other data: {', '.join(pairs)} differ; {_remedy(settings, content)}, "
                f"or start anew in another run_dir"
            )


def data_identity(
    config: DataConfig, *, seed: int, content: Mapping[str, str], held_out: Mapping[str, str] | None = None
) -> Identity:
    """Return the identity of a recipe's data.

    Args:
        config: The `data` section.
        seed: Seed of the order.
        content: See `Identity`.
        held_out: See `Identity`.
    """
    walked = list(_walk(config, "data"))
    settings = {key: value for key, value, _ in walked}
    settings |= {"seed": seed, "data.long_documents": config.long_document_rule}
    return Identity(settings, content, held_out or {}, {key: default for key, _, default in walked})


def _walk(config: Config, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, value, default) of every field that is not harmless."""
    harmless = {name for owner in type(config).__mro__ for name in HARMLESS.get(owner, ())}
    for name, info in type(config).model_fields.items():
        if name in harmless:
            continue
        key, value = f"{prefix}.{name}", getattr(config, name)
        if isinstance(value, Config):
            yield from _walk(value, key)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from _walk(item, f"{key}.{index}")
        else:
            default = None if info.is_required() else info.get_default(call_default_factory=True)
            yield key, _typed(value), _typed(default)


def _typed(value: Any) -> Any:
    """A mapping as it is typed, because its order counts and JSON's objects have none."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {item}" for key, item in value.items()) + "}"
    return value


def _section(key: str) -> str:
    return key.rpartition(".")[0]


def _differing(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [*mine, *(key for key in saved if key not in mine)]
    return {key: (saved.get(key), mine.get(key)) for key in keys if not _is_same(key, saved.get(key), mine.get(key))}


def _is_same(key: str, saved: Any, mine: Any) -> bool:
    return (saved is None) == (mine is None) if _is_movable(key) else bool(saved == mine)


def _is_movable(key: str) -> bool:
    return key.rpartition(".")[2] in _MOVABLE_NAMES


def _without_children_of_types(differing: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """Of two sources of different types only the type is worth a word."""
    parents = tuple(key.removesuffix("type") for key in differing if key.endswith(".type"))
    return {k: v for k, v in differing.items() if k.endswith(".type") or not k.startswith(parents)}


def _remedy(settings: Mapping[str, tuple[Any, Any]], content: Mapping[str, Any]) -> str:
    # Other settings usually are why the text, and a tokenizer trained on it, differ too.
    if any(key.endswith(".type") for key in settings):
        return "give data.source as in the recipe.yaml of the run"
    if settings:
        typed = [shlex.quote(f"{key}={_typed_as(saved)}") for key, (saved, _) in settings.items()]
        return f"type {' '.join(typed)} to go on"
    if list(content) == ["tokenizer"]:
        return "set data.tokenizer.path to the folder `tokenizer` of the run_dir"
    return "restore the text (that of local_corpus follows the installed packages)"


def _typed_as(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _shown(value: Any) -> str:
    text = "none" if value is None else _typed_as(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
