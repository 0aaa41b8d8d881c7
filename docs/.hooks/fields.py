"""The reference of configuration: a table of each class, made from its fields when the site is built.

A page says `::: module` where the classes of that module belong; `members: [Name]` below it takes some of them.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from leanmill.core.config import Config


PAGE = "reference/configuration.md"
DIRECTIVE = re.compile(r"^::: (\S+)\n((?:    .*(?:\n|$))*)", re.M)
MEMBERS = re.compile(r"members: \[([\w, ]+)\]")
WORDS = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything", object: "anything"}
OTHER_PAGES = {"TechniqueConfig": "[technique](../techniques/index.md)", "PassConfig": "[pass](../guides/compress.md)"}
NONE = re.compile(r"(?<!`)\bNone\b")
"""In sentences: recipes write `null`."""
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "multiple of {}"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write the tables of the page of fields; other pages stay."""
    if page.file.src_uri != PAGE:
        return markdown
    return DIRECTIVE.sub(lambda found: "\n".join(_section(found[1], found[2])) + "\n", markdown)


def _section(module_name: str, options: str) -> Iterator[str]:
    named = MEMBERS.search(options)
    wanted = named[1].split(", ") if named else None
    for name, found in vars(importlib.import_module(module_name)).items():
        if not (inspect.isclass(found) and issubclass(found, Config) and found.__module__ == module_name):
            continue
        if name in wanted if wanted else not name.startswith("_"):
            yield from class_lines(found)


def class_lines(found: type[Config]) -> Iterator[str]:
    """Yield heading, sentence and table of one class."""
    yield f"### {found.__name__} {{ #{found.__module__}.{found.__name__} }}\n"
    yield inspect.cleandoc(found.__doc__ or "") + "\n"
    yield "| key | what it takes | default | |"
    yield "|---|---|---|---|"
    # What kind of a thing it is comes first, wherever the classes above it have put it.
    for name, field in sorted(found.model_fields.items(), key=lambda item: item[0] != "type"):
        meaning = NONE.sub("`null`", " ".join((field.description or "").split()))
        cells = (f"`{name}`", kind_of(field), default_of(field), meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def kind_of(field: FieldInfo) -> str:
    """Say what a field takes: its type, choices and bounds."""
    annotation = field.annotation
    if get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
        kinds = [_kind(a) for a in get_args(annotation) if a is not type(None)]
        return _with_bounds(" or ".join(kinds), field.metadata) + " or `null`"
    return _with_bounds(_kind(annotation), field.metadata)


def default_of(field: FieldInfo) -> str:
    """Say the default as a recipe would write it."""
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined:
        made = field.default_factory()  # type: ignore[misc, call-arg]
        return _written(made) if made == field.default_factory() else "drawn"  # type: ignore[misc, call-arg]
    return _written(field.default)


def _written(value: Any) -> str:
    if isinstance(value, Config):
        given = value.model_dump(mode="json", exclude_defaults=True)
        kind = getattr(value, "type", None)
        return f"`{kind}`" if kind and not set(given) - {"type"} else f"`{json.dumps(given)}`"
    if isinstance(value, str) and value:
        return f"`{value}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{json.dumps(value, default=list)}`"


def _kind(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_bounds(_kind(arguments[0]), arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{json.dumps(a) if not isinstance(a, str) else a}`" for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(a) for a in arguments))
    if annotation is type(None):
        return "`null`"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return "[" + ", ".join(map(_kind, arguments)) + "]"
    if origin is dict or str(origin).endswith("Mapping'>"):
        return f"map from {_kind(arguments[0])} to {_kind(arguments[1])}"
    if origin is not None:
        return f"list of {_kind(arguments[0])}"
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        if annotation.__name__ in OTHER_PAGES:
            return OTHER_PAGES[annotation.__name__]
        return f"[{annotation.__name__}](#{annotation.__module__}.{annotation.__name__})"
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _with_bounds(kind: str, constraints: Any) -> str:
    """Append bounds, those of pydantic's own `Field` among them."""
    found = [c for given in constraints for c in (given.metadata if isinstance(given, FieldInfo) else [given])]
    bounds = [
        text.format(getattr(constraint, name))
        for constraint in found
        for name, text in BOUNDS.items()
        if getattr(constraint, name, None) is not None
    ]
    return f"{kind} {', '.join(bounds)}" if bounds else kind
