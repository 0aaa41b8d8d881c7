"""The options of PEFT's methods, read off the installed PEFT's own source: importing it would import torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names
from leanmill.peft_ext.peft.methods import METHODS, NOT_OPTIONS, REFUSED, REFUSED_OPTIONS


def check_method(name: object) -> None:
    """Refuse a method that PEFT does not have or that does not train here.

    Raises:
        ConfigError: With the nearest names, or the reason and what to type.
    """
    if not isinstance(name, str):
        raise ConfigError(f"peft.method {name!r} is no name; known methods: {', '.join(METHODS)}")
    if reason := REFUSED.get(name):
        raise ConfigError(f"peft.method={name} does not train here: {reason}")
    if name not in METHODS:
        near = near_names(name, METHODS, count=3)
        raise ConfigError(
            f"peft.method={name} is unknown; "
            + (f"did you mean {' or '.join(near)}?" if near else f"known methods: {', '.join(METHODS)}")
        )


def check_options(method: str, options: Iterable[str]) -> None:
    """Refuse options that PEFT's `method` does not have, or that a recipe says otherwise.

    Raises:
        ConfigError: With what to type.
    """
    own = option_names(method)
    for name in options:
        if name in NOT_OPTIONS:
            raise ConfigError(f"peft.{name}: {NOT_OPTIONS[name]}")
        if reason := REFUSED_OPTIONS.get(method, {}).get(name):
            raise ConfigError(f"peft.{name} (method: {method}) does not train here: {reason}")
        if name not in own:
            raise ConfigError(f"peft.{name} is no option of method: {method}; {_instead(method, name)}")


def option_names(method: str) -> frozenset[str]:
    """Names of the options of PEFT's `method` that a recipe may give."""
    return frozenset(_fields()[method] - NOT_OPTIONS.keys() - REFUSED_OPTIONS.get(method, {}).keys())


def defaults(method: str) -> Mapping[str, Any]:
    """Return the fields of PEFT's `method`, with their defaults; None for one that is no plain value."""
    return _fields()[method]


def _instead(method: str, name: str) -> str:
    own = option_names(method)
    near = near_names(name, own, count=1, cutoff=0.75)
    others = [other for other in METHODS if name in option_names(other)]
    if near:
        return f"did you mean {near[0]}?"
    if others:
        return f"it belongs to {', '.join(others[:4])}: set method: {others[0]}, or use one of {', '.join(sorted(own))}"
    near = near_names(name, own, count=1)
    return f"did you mean {near[0]}?" if near else f"it has {', '.join(sorted(own))}"


@functools.cache
def _fields() -> Mapping[str, Mapping[str, Any]]:
    """Fields of the configuration of every method of the installed PEFT with their defaults, by the method's name."""
    found = importlib.util.find_spec("peft")
    if found is None or found.origin is None:
        raise ConfigError("type: peft needs Hugging Face PEFT, which is not installed; run `pip install peft`")
    classes: dict[str, ast.ClassDef] = {}
    theirs = sorted((Path(found.origin).parent / "tuners").rglob("*.py"))
    ours = sorted((Path(__file__).parent.parent / "tuners").glob("*.py"))
    for path in [*(path for path in theirs if path.name in ("config.py", "lycoris_utils.py")), *ours]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes |= {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    named = {method: node for node in classes.values() for method in _method_of(node)}
    return {method: _fields_of(node, classes) for method, node in named.items()}


def _method_of(node: ast.ClassDef) -> list[str]:
    """The `PeftType` that a configuration gives itself, in lower case: `PeftType.LORA` or `PeftType("LORA")`."""
    given = [ast.unparse(inner.value) for inner in ast.walk(node) if isinstance(inner, ast.Assign)]
    return [found[1].lower() for text in given if (found := re.fullmatch(r"PeftType(?:\.|\(')(\w+)(?:'\))?", text))]


def _fields_of(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            fields |= _fields_of(classes[base.id], classes)
    own = [item for item in node.body if isinstance(item, ast.AnnAssign)]
    return fields | {item.target.id: _default(item.value) for item in own if isinstance(item.target, ast.Name)}


def _default(value: ast.expr | None) -> Any:
    """The default of a field: `field(default=...)`, `field(default_factory=dict)`, or the value itself."""
    made_of = {keyword.arg: keyword.value for keyword in value.keywords} if isinstance(value, ast.Call) else {}
    if "default_factory" in made_of:
        return {"dict": {}, "list": []}.get(ast.unparse(made_of["default_factory"]))
    try:
        return None if value is None else ast.literal_eval(made_of.get("default", value))
    except ValueError:
        return None
