"""Recipes from files: YAML and dotted overrides in, a validated `Recipe` or clear lines out. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import BaseModel, ValidationError

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names
from leanmill.core.secrets import shown
from leanmill.recipe.errors import describe
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import LENGTHS
from leanmill.recipe.yaml_source import MAX_DEPTH, Lines, parse_scalar, parse_yaml


_MAX_BYTES = 2**18
"""Size of a recipe file; recipes have some thousand bytes, and YAML is read at about 100 kB/s."""
_NUMBER = re.compile(r"[0-9]{1,6}")


Root = TypeVar("Root", bound=BaseModel)


@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe: ...
@overload
def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, root: type[Root]) -> Root: ...
def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, root: type[BaseModel] = Recipe) -> BaseModel:
    """Read, override and validate a recipe.

    Args:
        path: YAML file, UTF-8.
        overrides: `a.b=c` each; the value is YAML, a number in the path indexes a list
            (`techniques.0.group_size=8`), and the index just past a list's end appends.
        root: What the file describes.

    Raises:
        ConfigError: One line for each problem: where, what was given, what is allowed.
    """
    text = _read(Path(path))
    raw, lines = parse_yaml(text, str(path))
    if raw is None:
        raise ConfigError(
            f"{path} is empty; a recipe needs at least `model:` and `train:`, see recipes/quickstart.yaml"
        )
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds a {type(raw).__name__}, not a mapping of sections such as `model:` and `train:`; "
            f"see recipes/quickstart.yaml"
        )
    override_recipe(raw, overrides, lines)
    return validate_recipe(raw, source=str(path), lines=lines, root=root)


@overload
def validate_recipe(raw: dict[str, Any], source: str = "recipe", lines: Lines | None = None) -> Recipe: ...
@overload
def validate_recipe(
    raw: dict[str, Any], source: str = "recipe", lines: Lines | None = None, *, root: type[Root]
) -> Root: ...
def validate_recipe(
    raw: dict[str, Any], source: str = "recipe", lines: Lines | None = None, *, root: type[BaseModel] = Recipe
) -> BaseModel:
    """Validate a mapping, such as a checkpoint's `recipe.json`.

    Args:
        raw: The recipe as plain values.
        source: What error lines call it.
        lines: Line number of each path, where it came from a file, and the overrides.
        root: What the mapping describes.

    Raises:
        ConfigError: One line for each problem.
    """
    try:
        return root.model_validate(raw)
    except ValidationError as error:
        # `from None`: the chain would print inputs, and an input may be a credential.
        raise ConfigError("\n".join(describe(error, root, raw, source, lines or {}))) from None


def resolved_yaml(recipe: Recipe) -> str:
    """Return the whole recipe, defaults written out, as YAML that `load_recipe` reads back equal."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def override_recipe(raw: dict[str, Any], overrides: Sequence[str], lines: Lines) -> None:
    """Write overrides into `raw`, and into `lines` that they did.

    The length of a run is one of several keys: an override of one takes the place of another that the file gives.

    Raises:
        ConfigError: See `apply_override`.
    """
    given = [_keys_of(override) for override in overrides]
    for override, keys in zip(overrides, given, strict=True):
        apply_override(raw, override)
        _replace_siblings(raw, keys, given)
        _put_place(lines, override)


def _replace_siblings(raw: dict[str, Any], keys: list[str], given: Sequence[list[str]]) -> None:
    """Drop the other lengths beside the one that `keys` lead to, but for those that are overrides themselves."""
    if keys[-2:-1] != ["train"] or keys[-1] not in LENGTHS:
        return
    section: Any = raw
    for key in keys[:-1]:
        section = section[int(key)] if isinstance(section, list) else section[key]
    if section[keys[-1]] is not None:
        for other in LENGTHS:
            if other in section and [*keys[:-1], other] not in given:
                section[other] = None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Write one `a.b=c` into `raw`, making sections on the way.

    Raises:
        ConfigError: No `=`, an index past the end, or a path through a plain value.
    """
    path, equals, value = override.partition("=")
    keys, name = _keys_of(override), shown(path, override)
    if not equals or not all(keys):
        raise ConfigError(f"override {name} is not of the form a.b=value; type e.g. train.steps=100")
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"override {name} has {len(keys)} levels; a recipe needs about six, give at most {MAX_DEPTH}")
    node: Any = raw
    for depth, key in enumerate(keys[:-1]):
        node = _child(node, key, keys, depth, name)
    _assign(node, keys, parse_scalar(value, name), name)


def _keys_of(override: str) -> list[str]:
    return override.partition("=")[0].strip().split(".")


def _put_place(lines: Lines, override: str) -> None:
    """Mark what `override` replaced as written by it, in no line of the file."""
    path = tuple(int(key) if _NUMBER.fullmatch(key) else key for key in _keys_of(override))
    for below in [known for known in lines if known[: len(path)] == path]:
        del lines[below]
    lines[path] = shown(override.partition("=")[0], override)


def _child(node: Any, key: str, keys: list[str], depth: int, override: str) -> Any:
    """Return the container under `key`, creating it where there is none."""
    wanted: Any = [] if _NUMBER.fullmatch(keys[depth + 1]) and (depth + 1 == 1) else {}
    if isinstance(node, list):
        index = _index(node, key, override)
        if index == len(node):
            node.append({})
        return node[index]
    if not isinstance(node, dict):
        raise _not_a_section(node, keys[:depth], override)
    child = node.get(key)
    if child is None:
        node[key] = wanted
    elif isinstance(child, str) and keys[: depth + 1] in (["engine"], ["layout", "experts"]):
        node[key] = {"type": child}  # the short form of the section
    return node[key]


def _assign(node: Any, keys: list[str], value: Any, override: str) -> None:
    key = keys[-1]
    if isinstance(node, list):
        index = _index(node, key, override)
        node[index : index + 1] = [value]
    elif isinstance(node, dict):
        node[key] = value
    else:
        raise _not_a_section(node, keys[:-1], override)


def _index(node: list[Any], key: str, override: str) -> int:
    if not _NUMBER.fullmatch(key) or int(key) > len(node):
        raise ConfigError(
            f"override {override}: {key!r} is no place in a list of {len(node)}; type 0 to {len(node)} "
            f"(the last one appends)"
        )
    return int(key)


def _not_a_section(node: Any, keys: list[str], override: str) -> ConfigError:
    name = ".".join(keys)
    return ConfigError(
        f"override {override}: {name} is the plain value {shown(name, node)}, so nothing lies below it; "
        f"set {name} itself, or correct the key"
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        if len(text) > _MAX_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_BYTES:,} bytes, so it is no recipe; name a recipe file")
        return text.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"no recipe at {path}; {_nearby(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; name a recipe file in it") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            f"save it as UTF-8, e.g. `iconv -f latin1 -t utf-8`"
        ) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a recipe file that you may read") from None


def _nearby(path: Path) -> str:
    folders = [folder for folder in (path.parent, Path("recipes")) if folder.is_dir()]
    found = sorted(str(p) for folder in folders for p in folder.glob("[!.]*.yaml"))
    near = near_names(str(path), found, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    if found:
        return f"there are {', '.join(found[:8])}"
    return f"there is no recipe in {path.parent} either; name a YAML file, e.g. recipes/quickstart.yaml"
