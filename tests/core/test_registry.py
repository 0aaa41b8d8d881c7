"""Techniques that live in somebody else's package."""

import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest

from leanmill.cli.main import main
from leanmill.core import registry
from leanmill.core.errors import ConfigError
from leanmill.recipe.root import Recipe
from leanmill.recipe.schema import recipe_schema


CONFIG = '''
from typing import Literal
from leanmill.core.technique import Installation, TechniqueConfig

class Halve(TechniqueConfig):
    """Halves nothing yet."""

    type: Literal["halve"] = "halve"
    """Name."""
    factor: float = 0.5
    """Factor."""

    def install(self, sites, context):
        return Installation()
'''
TABLE = """
from leanmill.core.registry import Entry

TECHNIQUES = {"halve": Entry("my_methods.config:Halve", "halves", "none")}
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "my_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text(TABLE)
    (folder / "config.py").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_of_plugins", {})
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "my_methods"]:
        del sys.modules[name]


def recipe(**more):
    config = {"model_type": "llama", "vocab_size": 64}
    return {"model": {"config": config}, "train": {"steps": 1}, "techniques": [{"type": "halve"}], **more}


def test_a_recipe_names_a_module(package):
    with pytest.raises(ValueError, match="unknown technique type 'halve'"):
        Recipe.model_validate(recipe())
    found = Recipe.model_validate(recipe(plugins=["my_methods"]))
    assert found.techniques[0].factor == 0.5
    again = Recipe.model_validate_json(found.model_dump_json())  # what a checkpoint holds
    assert again == found
    with pytest.raises(ValueError, match="factr"):
        Recipe.model_validate(recipe(plugins=["my_methods"], techniques=[{"type": "halve", "factr": 1}]))


def test_an_installed_package_needs_no_mention(package, monkeypatch, capsys):
    point = EntryPoint("halve", "my_methods.config:Halve", registry.GROUP)
    points = EntryPoints([point])
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda *, group: points.select(group=group))
    registry._of_packages.cache_clear()
    try:
        assert Recipe.model_validate(recipe()).techniques[0].type == "halve"
        assert "halve" in recipe_schema()["properties"]["techniques"]["items"]["discriminator"]["mapping"]
        assert main(["methods"]) == 0
        assert "halve" in capsys.readouterr().out
    finally:
        registry._of_packages.cache_clear()


def test_plugins_that_do_not_work_are_named(package):
    with pytest.raises(ConfigError, match=r"'no_such_module' cannot be imported.*PYTHONPATH"):
        registry.load_plugin("no_such_module")
    with pytest.raises(ConfigError, match="no table of techniques"):
        registry.load_plugin("json")
    (package / "__init__.py").write_text(TABLE.replace('"halve":', '"ternary":'))
    with pytest.raises(ConfigError, match=r"'ternary'.*Leanmill's own"):
        registry.load_plugin("my_methods")
