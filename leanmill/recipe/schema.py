"""The JSON schema of a recipe with every technique in it. Imports no torch."""

from __future__ import annotations

from typing import Any

from leanmill.core.config import Config
from leanmill.core.registry import PASSES, known_techniques, pass_class, technique_class
from leanmill.recipe.root import Recipe


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
    definitions.pop("PassConfig", None)
    engine = schema["properties"]["engine"]
    names = sorted(engine["discriminator"]["mapping"])
    union = {key: engine.pop(key) for key in ("oneOf", "discriminator")}
    engine["anyOf"] = [{"enum": names, "description": "Short for `{type: ...}`."}, union]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Leanmill recipe", **schema}


def _add(model: type[Config], definitions: dict[str, Any]) -> str:
    """Put one technique or pass and what it refers to into `definitions`; return its key there."""
    own = model.model_json_schema()
    definitions.update(own.pop("$defs", {}))
    own.setdefault("required", [])
    own["required"] = ["type", *(key for key in own["required"] if key != "type")]
    definitions[model.__name__] = own
    return model.__name__
