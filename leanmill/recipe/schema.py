"""The JSON schema of a recipe with every technique in it. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from leanmill.core.config import Config
from leanmill.core.levels import Dense, Drop, SearchConfig
from leanmill.core.passes import LayerPassConfig
from leanmill.core.registry import PASSES, known_techniques, pass_class, technique_class
from leanmill.optim.config import AdamW
from leanmill.parallel.config import FullyShardedExperts
from leanmill.recipe.root import Recipe
from leanmill.recipe.yaml_source import EXPONENT


_MEANT_WITHOUT_TYPE = (AdamW.__name__, FullyShardedExperts.__name__)
"""Of the sections of several types, the ones that a mapping without `type` means."""


def recipe_schema() -> dict[str, Any]:
    """Return the schema (draft 2020-12); fields carry their descriptions.

    Pydantic sees techniques only as their base class, since the registry imports them on demand;
    here the union of all of them, told apart by `type`, takes its place.
    """
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    mapping = {name: f"#/$defs/{_add(technique_class(name), definitions)}" for name in known_techniques()}
    schema["properties"]["techniques"]["items"] = {
        "oneOf": [{"$ref": reference} for reference in mapping.values()],
        "discriminator": {"propertyName": "type", "mapping": mapping},
    }
    definitions.pop("TechniqueConfig", None)
    passes = {name: f"#/$defs/{_add(pass_class(name), definitions)}" for name in PASSES}
    definitions["PhaseConfig"]["properties"]["passes"]["items"] = {
        "oneOf": [{"$ref": reference} for reference in passes.values()],
        "discriminator": {"propertyName": "type", "mapping": passes},
    }
    _list_levels(passes, definitions)
    definitions.pop("PassConfig", None)
    for section in (schema["properties"]["engine"], definitions["LayoutConfig"]["properties"]["experts"]):
        _allow_name(section)
    for union in list(_unions(schema)):
        _discriminate(union, definitions)
    _allow_exponents(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Leanmill recipe", **schema}


def _list_levels(passes: Mapping[str, str], definitions: dict[str, Any]) -> None:
    """Say what the levels of a search may be, which its class knows as passes only."""
    levels = {name: reference for name, reference in passes.items() if issubclass(pass_class(name), LayerPassConfig)}
    levels |= {name: f"#/$defs/{_add(level, definitions)}" for name, level in (("dense", Dense), ("drop", Drop))}
    for name, reference in passes.items():
        if issubclass(pass_class(name), SearchConfig):
            items = {
                "oneOf": [{"$ref": level} for level in levels.values()],
                "discriminator": {"propertyName": "type", "mapping": dict(levels)},
            }
            _allow_name(items)
            definitions[reference.rpartition("/")[2]]["properties"]["levels"]["items"] = items


def _allow_name(section: dict[str, Any]) -> None:
    """Let a section of several types be its type alone, without options."""
    names = sorted(section["discriminator"]["mapping"])
    union = {key: section.pop(key) for key in ("oneOf", "discriminator")}
    section |= {
        "if": {"type": "string"},
        "then": {"enum": names, "description": "Short for `{type: ...}`."},
        "else": union,
    }


def _unions(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every union whose members `type` tells apart."""
    if isinstance(node, dict) and "discriminator" in node:
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _unions(child)


def _discriminate(union: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Have `type` choose the member of a union for validators too, which do not look at `discriminator`.

    Without, a misspelt key is answered with "not valid under any of the given schemas".
    """
    mapping = union["discriminator"]["mapping"]
    choices = []
    for tag, reference in mapping.items():
        definition = definitions[reference.rpartition("/")[2]]
        required = [] if definition["title"] in _MEANT_WITHOUT_TYPE else ["type"]
        definition["required"] = [*required, *(key for key in definition.get("required", ()) if key != "type")]
        is_it: dict[str, Any] = {"properties": {"type": {"const": tag}}, "required": required}
        choices.append({"if": is_it, "then": {"$ref": reference}})
    union |= {"type": "object", "properties": {"type": {"enum": list(mapping)}}, "allOf": choices}


def _allow_exponents(node: Any) -> None:
    """Let numbers be written as `3e-3`: readers that follow YAML 1.1 hand a validator that as text."""
    if isinstance(node, dict):
        if node.get("type") in ("number", "integer"):
            # Bounds speak of numbers only and the pattern of text only.
            node |= {"type": [node["type"], "string"], "pattern": EXPONENT.pattern}
        for child in node.values():
            _allow_exponents(child)
    elif isinstance(node, list):
        for child in node:
            _allow_exponents(child)


def _add(model: type[Config], definitions: dict[str, Any]) -> str:
    """Put one technique or pass and what it refers to into `definitions`; return its key there."""
    own = model.model_json_schema()
    definitions.update(own.pop("$defs", {}))
    definitions[model.__name__] = own
    return model.__name__
