"""YAML as recipes use it: safe, no duplicate keys, `1e-3` is a number, every value knows its line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from leanmill.core.errors import ConfigError


Lines = dict[tuple[str | int, ...], int | str]
"""Line (from 1) of each path in the file, or the override that wrote it, as messages name it."""

MAX_DEPTH = 20
"""Levels of nesting; a recipe uses about six."""
_MAX_CHARACTERS = 1_000_000
"""Size of a document once its aliases are written out; a recipe has some thousand characters."""
_INT64 = 2**63
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}
EXPONENT = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")
"""A number with an exponent, a dot in it or not."""
_UNWRITABLE = re.compile("[\x00\ud800-\udfff]")
_MERGE = "tag:yaml.org,2002:merge"
_TOO_DEEP = f"more than {MAX_DEPTH} levels of nesting; a recipe needs about six, remove some"
_REMEDY = (
    "correct it there (a space after each colon, spaces for tabs, brackets and quotes closed, quotes around text "
    "that holds signs such as : or #)"
)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads YAML 1.2 floats, and leaves dates and `=` as the text they are."""

    def fetch_flow_collection_start(self, token_class: Any) -> None:
        # The scanner looks ahead through open brackets, in time that grows with the square of their number.
        if self.flow_level > MAX_DEPTH:
            raise _Problem(_TOO_DEEP, self.get_mark())  # type: ignore[no-untyped-call]
        super().fetch_flow_collection_start(token_class)  # type: ignore[no-untyped-call]


# PyYAML follows YAML 1.1, where `1e-3` (no dot) is a string.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    EXPONENT,
    list("-+0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN or tag == _MERGE]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, source: str) -> tuple[Any, Lines]:
    """Parse one document.

    Keys are the text they are written as (`1` and `on` too), an alias is a copy of what it names, and
    keys merged by `<<` have the line where they are written.

    Returns:
        The plain value, and the line of every path in it.

    Raises:
        ConfigError: Not YAML, a key twice, a tag, or too deep or large; the message has the line.
    """
    try:
        return _read(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{line}: not a YAML recipe: {_problem(error)}") from None


def parse_scalar(text: str, override: str) -> Any:
    """Parse the value of an override.

    Args:
        text: The value.
        override: What error lines call the override.

    Raises:
        ConfigError: Not YAML.
    """
    try:
        return _read(text)[0]
    except (yaml.YAMLError, RecursionError) as error:
        problem = _problem(error).removesuffix(f"; {_REMEDY}")
        raise ConfigError(
            f"override {override}: the value is not YAML ({problem}); quote it, e.g. key='\"value\"'"
        ) from None


class _Problem(yaml.MarkedYAMLError):
    """A problem whose text already says what to do."""

    def __init__(self, text: str, place: Any) -> None:
        super().__init__(problem=text, problem_mark=place.start_mark if isinstance(place, yaml.Node) else place)


def _read(text: str) -> tuple[Any, Lines]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _Extent().measure(node)
        lines: Lines = {}
        return _build(loader, node, (), lines), lines
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]


class _Extent:
    """What a document would be with its aliases written out, found without writing them out.

    Each node is visited once, however many aliases name it: eight levels of nine aliases make
    43 million nodes of half a kilobyte.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[int, int] | None] = {}

    def measure(self, node: yaml.Node) -> tuple[int, int]:
        """Return (characters, levels) of `node`; refuse what no recipe is."""
        if id(node) in self._of:
            known = self._of[id(node)]
            if known is None:
                raise _Problem("an anchor holds an alias of itself; write the value out", node)
            return known
        self._of[id(node)] = None
        if node.tag not in _PLAIN:
            raise _Problem(
                f"the tag {_short_tag(node.tag)} is not for recipes; remove it and write a plain value", node
            )
        if isinstance(node, yaml.ScalarNode) and _UNWRITABLE.search(node.value):
            raise _Problem("a character that no file can hold; remove the escape that makes it", node)
        parts = [self.measure(child) for child in _children(node)]
        characters = 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else sum(size for size, _ in parts))
        levels = 1 + max((level for _, level in parts), default=-1)
        if characters > _MAX_CHARACTERS:
            raise _Problem(
                f"with its aliases written out this has more than {_MAX_CHARACTERS:,} characters; remove aliases", node
            )
        if levels > MAX_DEPTH:
            raise _Problem(_TOO_DEEP, node)
        self._of[id(node)] = characters, levels
        return characters, levels


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag not in {*_PLAIN, _MERGE}:
            raise _Problem("keys must be plain words; write e.g. `name: value`", key)
        if key.value in seen:
            raise _Problem(f"key {key.value!r} is given twice (first in line {seen[key.value]}); keep one", key)
        seen[key.value] = key.start_mark.line + 1
        yield from (key, value) if key.tag != _MERGE else (value,)


def _build(loader: _Loader, node: yaml.Node, path: tuple[str | int, ...], lines: Lines) -> Any:
    """Return the plain value of `node`, a copy for each path, and put every path's line into `lines`."""
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            lines[(*path, index)] = item.start_mark.line + 1
            items.append(_build(loader, item, (*path, index), lines))
        return items
    if isinstance(node, yaml.MappingNode):
        mapping = {}
        for key, value in _pairs(node):
            lines[(*path, key.value)] = key.start_mark.line + 1
            mapping[key.value] = _build(loader, value, (*path, key.value), lines)
        return mapping
    return _scalar(loader, node)


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield keys and values, those merged by `<<` first so that the mapping's own replace them."""
    for key, value in node.value:
        if key.tag != _MERGE:
            continue
        # Of a list, the first mapping wins.
        merged = reversed(value.value) if isinstance(value, yaml.SequenceNode) else [value]
        for mapping in merged:
            if not isinstance(mapping, yaml.MappingNode):
                raise _Problem("`<<` merges a mapping or a list of them; name one, e.g. `<<: *defaults`", key)
            yield from _pairs(mapping)
    yield from ((key, value) for key, value in node.value if key.tag != _MERGE)


def _scalar(loader: _Loader, node: yaml.Node) -> Any:
    try:
        value = loader.construct_object(node)  # type: ignore[no-untyped-call]
    except (ValueError, KeyError, OverflowError):
        kind = node.tag.rpartition(":")[2]
        raise _Problem(f"{node.value[:40]!r} is no {kind} that can be read; quote it or correct it", node) from None
    if isinstance(value, int) and not -_INT64 <= value < _INT64:
        raise _Problem(f"the number {node.value[:20]}... is beyond 64 bits; give a smaller one", node)
    return value


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return _TOO_DEEP
    text = " ".join(str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).split())
    if isinstance(error, _Problem):
        return text
    if "another document" in text:
        return "there is more than one document; keep one, without `---` between sections"
    return f"{text}; {_REMEDY}"
