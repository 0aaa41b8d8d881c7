"""YAML as recipes use it: safe, no duplicate keys, `1e-3` is a number, every value knows its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from leanmill.core.errors import ConfigError


Lines = dict[tuple[str | int, ...], int]
"""Line (from 1) of each path in the file."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads YAML 1.2 floats."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.MarkedYAMLError(problem="keys must be plain words", problem_mark=key_node.start_mark)
            if key in seen and key != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} is given twice (first in line {seen[key]}); keep one",
                    problem_mark=key_node.start_mark,
                )
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where `1e-3` (no dot) is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """Parse one document.

    Returns:
        The plain value, and the line of every path in it.

    Raises:
        ConfigError: Not YAML, or a key twice; the message has the line.
    """
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:
        raise _as_config_error(error, source) from None
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        value = loader.construct_document(node)  # type: ignore[no-untyped-call]
        return value, dict(_lines(node, ()))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _as_config_error(error, source) from None
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


def parse_scalar(text: str, override: str) -> Any:
    """Parse the value of an override.

    Raises:
        ConfigError: Not YAML.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"override {override!r}: the value is not YAML ({_problem(error)}); quote it, e.g. key='\"value\"'"
        ) from None


def _lines(node: yaml.Node, path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], int]]:
    # Anchors make a node reachable twice; a path is never visited twice, and cycles cannot be
    # written in a document that `construct_document` accepted for a recipe of plain values.
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, str(key.value))
            yield below, key.start_mark.line + 1
            yield from _lines(value, below)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*path, index), item.start_mark.line + 1
            yield from _lines(item, (*path, index))


def _problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(problem).split())


def _as_config_error(error: Exception, source: str) -> ConfigError:
    mark = getattr(error, "problem_mark", None)
    line = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
    return ConfigError(f"{source}{line}: not a YAML recipe: {_problem(error)}")
