"""Validation errors in the words of a recipe: one line each, with the nearest known key. Imports no torch."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from leanmill.core.near import near_names
from leanmill.core.registry import PASSES, known_techniques, pass_class, technique_class
from leanmill.core.secrets import is_secret, shown
from leanmill.recipe.yaml_source import Lines


Path = tuple[str | int, ...]


def describe(error: ValidationError, root: type[BaseModel], raw: Any, source: str, lines: Lines) -> list[str]:
    """Return one line for each problem: file and line or override, key, what was given, what is allowed.

    Args:
        error: What validation raised.
        root: The model that was validated.
        raw: What it was validated from.
        source: Name of the file, for the front of each line.
        lines: Line number of each path of the file, or the override that wrote it.
    """
    found = dict.fromkeys(_problems(error, root, raw))  # a union may report one problem twice
    return [f"{_front(path, text, source, lines)}: {text}" for path, text in found]


def _front(path: Path, text: str, source: str, lines: Lines) -> str:
    """Name where a problem is: the override that made it, or the file and its line."""
    if spoken_of := _overrides_in(path, text, lines):
        return f"override{'s' if len(spoken_of) > 1 else ''} {', '.join(sorted(spoken_of))}"
    while path:
        place = lines.get(path)
        if isinstance(place, str):
            return f"override {place}"
        if place is not None:
            return f"{source} line {place}"
        path = path[:-1]
    return source


def _overrides_in(path: Path, text: str, lines: Lines) -> list[str]:
    """Overrides below `path` whose keys a line about the whole of it speaks of: keys that do not fit each other."""
    below = {known: place for known, place in lines.items() if isinstance(place, str) and known[: len(path)] == path}
    names = {place: _dotted(known[len(path) :]) for known, place in below.items() if len(known) > len(path)}
    return [place for place, name in names.items() if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]\w)", text)]


def _problems(error: ValidationError, root: type[BaseModel], raw: Any) -> Iterator[tuple[Path, str]]:
    alternatives: dict[Path, list[tuple[Mapping[str, Any], list[type[BaseModel]], str]]] = {}
    for item in error.errors(include_url=False):
        path, owners, below = _resolve(item["loc"], root, raw)
        if path[-1:] == ("[key]",) and item["type"] == "literal_error":
            path = path[:-1]
            yield path, _unknown_key(_dotted(path), str(path[-1]), None, _unquote(item["ctx"]["expected"]))
            continue
        cause = item.get("ctx", {}).get("error")
        if cause is not None:
            yield from ((path, _placed(line, path)) for line in str(cause).splitlines())
        elif item["type"] in ("extra_forbidden", "missing", "union_tag_not_found", "union_tag_invalid"):
            yield path, _shape_problem(item, path, owners, below)
        else:
            alternatives.setdefault(path, []).append((item, owners, _allowed(item, below)))
    for path, items in alternatives.items():
        yield path, _value_problem(path, items)


def _placed(line: str, path: Path) -> str:
    """Put the place in front of a validator's own line, unless it names the key itself."""
    name = _dotted(path)
    return line if not path or name in line else f"{name}: {line}"


def _shape_problem(
    item: Mapping[str, Any], path: Path, owners: Sequence[type[BaseModel]], below: Sequence[type[BaseModel]]
) -> str:
    name = _dotted(path)
    if item["type"] == "extra_forbidden":
        return _unknown_key(name, str(path[-1]), item["input"], _keys(owners))
    if item["type"] == "missing":
        return f"{name} is missing; add it{_meaning(owners, str(path[-1]))}"
    tags = [tag for model in below for tag in get_args(model.model_fields["type"].annotation)]
    known_types = f"known types: {', '.join(tags)}"
    if item["type"] == "union_tag_not_found":
        return f"{name} needs a `type`, got {shown(name, item['input'])}; {known_types}"
    tag = item["input"].get("type") if isinstance(item["input"], Mapping) else item["ctx"]["tag"]
    near = _near(tag, tags) if isinstance(tag, str) else ""
    return f"{name}.type={shown(name, tag)} is unknown; {known_types}{near}"


def _value_problem(path: Path, items: Sequence[tuple[Mapping[str, Any], Sequence[type[BaseModel]], str]]) -> str:
    """One line for a value that no member of its type accepts."""
    item, owners, _ = items[0]
    key = str(path[-1]) if path else ""
    text = f"{_dotted(path)}={shown(key, item['input'])} is not allowed; give {' or '.join(a for *_, a in items)}"
    if item["type"] == "literal_error" and len(items) == 1:
        text += _near(str(item["input"]), _unquote(item["ctx"]["expected"]))
    return text + _meaning(owners, key)


_WORDS = {
    "dict_type": "a mapping of keys to values",
    "list_type": "a list, e.g. [a, b]",
    "tuple_type": "a list, e.g. [a, b]",
    "string_type": "text (quote it where it looks like something else)",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_from_float": "a whole number",
    "int_parsing": "a valid integer",
    "int_parsing_size": "a smaller integer",
    "invalid_key": "keys that are text",
}
"""What is allowed, where pydantic's own words speak of Python."""


def _allowed(item: Mapping[str, Any], below: Sequence[type[BaseModel]]) -> str:
    kind = item["type"]
    if kind == "literal_error":
        return str(item["ctx"]["expected"])
    if kind in ("model_type", "model_attributes_type"):
        return f"a mapping of {'a type and its keys' if len(below) > 1 else ', '.join(_keys(below))}"
    if kind.endswith("too_short"):
        return f"at least {item['ctx']['min_length']} of them"
    if kind.endswith("too_long"):
        return f"at most {item['ctx']['max_length']} of them"
    message = _WORDS.get(kind) or item["msg"].removeprefix("Input should be ").split(", unable to parse")[0]
    return f"a value {message}" if message.startswith(("greater", "less")) else message


def _keys(models: Sequence[type[BaseModel]]) -> list[str]:
    return list(dict.fromkeys(key for model in models for key in model.model_fields))


def _unknown_key(name: str, key: str, value: Any, known: list[str]) -> str:
    near = near_names(key, known)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    secret = "; credentials do not belong in a recipe" if is_secret(key, value) else ""
    return f"unknown key {name}; {hint}{secret}"


def _meaning(models: Sequence[type[BaseModel]], key: str) -> str:
    for model in models:
        if key in model.model_fields and (text := model.model_fields[key].description):
            return f" ({' '.join(text.split()).split('. ')[0].rstrip('.')})"
    return ""


def _unquote(text: str) -> list[str]:
    return [part.strip().strip("'") for part in text.replace(" or ", ", ").split(",") if part.strip()]


def _near(given: str, known: Sequence[str]) -> str:
    near = near_names(given, known)
    return f"; did you mean {near[0]!r}?" if near else ""


def _dotted(path: Path) -> str:
    return ".".join(map(str, path)) or "recipe"


def _resolve(
    loc: Sequence[str | int], root: type[BaseModel], raw: Any
) -> tuple[Path, list[type[BaseModel]], list[type[BaseModel]]]:
    """Return the path as written in the recipe, the models its last key belongs to, and those below it.

    Pydantic puts the chosen member of a union into the location; it is no key of the recipe.
    """
    path: list[str | int] = []
    here: Any = root
    owners: list[type[BaseModel]] = []
    for part in loc:
        models = _models(here)
        tagged = [model for model in models if _has_tag(model, part)]
        if len(models) > 1 and tagged:
            here, owners = tagged[0], tagged
            continue
        if not models and _is_union_label(here, part):
            continue
        path.append(part)
        owners = models
        here = _below(here, models, part)
        if path[-2:] and len(path) in (2, 4) and path[-2] in ("techniques", "passes"):
            here = _registered(raw, path) or here
    return tuple(path), owners, _models(here)


def _registered(raw: Any, path: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the class of one entry of `techniques` or `passes`, which the annotation knows as its base only."""
    try:
        for part in (*path, "type"):
            raw = raw[part]
    except (KeyError, IndexError, TypeError):
        return None
    if not isinstance(raw, str):
        return None
    if path[-2] == "passes":
        return pass_class(raw) if raw in PASSES else None
    return technique_class(raw) if raw in known_techniques() else None


def _below(here: Any, models: list[type[BaseModel]], part: str | int) -> Any:
    for model in models:
        if part in model.model_fields:
            return model.model_fields[str(part)].annotation
    arguments = get_args(_plain(here))
    return arguments[-1] if arguments and get_origin(_plain(here)) in (list, dict, tuple) else None


def _plain(annotation: Any) -> Any:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        others = [a for a in get_args(annotation) if a is not type(None)]
        return _plain(others[0]) if len(others) == 1 else annotation
    return annotation


def _models(annotation: Any) -> list[type[BaseModel]]:
    annotation = _plain(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        return [model for member in get_args(annotation) for model in _models(member)]
    return []


def _has_tag(model: type[BaseModel], part: str | int) -> bool:
    field = model.model_fields.get("type")
    return field is not None and get_origin(field.annotation) is Literal and part in get_args(field.annotation)


def _is_union_label(annotation: Any, part: str | int) -> bool:
    """Whether `part` names a member of a union of plain types, such as `int` or `literal['auto']`."""
    return get_origin(_plain(annotation)) in (Union, types.UnionType) and isinstance(part, str)
