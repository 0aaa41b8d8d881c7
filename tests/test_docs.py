"""The guide to adding a technique is followed to the letter, and the site's pages exist."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import leanmill
from leanmill.core import registry
from leanmill.core.rules import metrics_of
from leanmill.core.sites import iter_sites
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.recipe.schema import recipe_schema
from tests.contract_training import FixedRows, full_parameters, recipe_of, train


ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'^```(?:python|yaml) title="([^"]+)"\n(.*?)^```', re.M | re.S)


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """Write the guide's files, register its technique, return its titled blocks."""
    text = (ROOT / "docs/techniques/add-a-technique.md").read_text(encoding="utf-8")
    blocks = dict(BLOCK.findall(text))
    for title, body in blocks.items():
        if title.endswith(".py"):
            path = tmp_path / title
            path.parent.mkdir(exist_ok=True)
            path.write_text(body, encoding="utf-8")
            (path.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "TECHNIQUES", dict(registry.TECHNIQUES))
    monkeypatch.setattr(registry, "_of_plugins", {})
    exec(blocks["registry"], {"TECHNIQUES": registry.TECHNIQUES, "Entry": registry.Entry})
    yield blocks
    for name in [name for name in sys.modules if name.split(".")[0] in ("power_of_two", "own_techniques")]:
        del sys.modules[name]


def test_the_guide_makes_a_working_technique(guide):
    techniques = [registry.parse_technique(item) for item in yaml.safe_load(guide["recipe"])["techniques"]]
    recipe = recipe_of((), {"type": "single"}, "", 1).model_copy(update={"techniques": techniques})
    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    before = full_parameters(train(recipe, one, num_steps=0)[0])
    engine, _ = train(recipe, one)
    after = full_parameters(engine)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    num_sites = 0
    for name, site in iter_sites(engine.module.model):
        weight = site.effective_weight().detach()
        levels = weight[weight != 0].abs().log2()
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-5)
        assert levels.round().unique().numel() <= 3, name
        assert ((weight.reshape(-1, 4) == 0).sum(-1) >= 2).all(), name
        num_sites += 1
    assert num_sites == 14


def test_a_package_of_ones_own_brings_stages_a_loss_and_a_rule(guide):
    given = yaml.safe_load(guide["recipe with plugins"])
    recipe = Recipe.model_validate(recipe_of((), {"type": "single"}, "", 1).model_dump(mode="json") | given)
    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    engine, loop = train(recipe, one, num_steps=1)
    assert metrics_of(loop.step_rules) == {"confidence_penalty/strength": pytest.approx(0.05)}
    rows = FixedRows().next_rows(4, rank=0, world_size=1)
    batch = {**rows, "position_ids": torch.arange(rows["input_ids"].shape[1]).expand(4, -1)}
    losses = engine.module(batch)
    # Logits of a fresh model are nearly uniform: entropy log 61 a token.
    penalty = losses["confidence_penalty"] / (rows["labels"] != -100).sum()
    assert penalty.item() == pytest.approx(-0.05 * math.log(61), rel=0.02)
    torch.testing.assert_close(losses["total"], losses["cross_entropy"] + losses["confidence_penalty"])
    sites = [site for _, site in iter_sites(engine.module.model)]
    assert len(sites) == 14
    for site in sites:
        step = site.weight.abs().amax(-1, keepdim=True) / 127
        codes = (site.effective_weight() / step).detach()
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        assert site.operands().bound(site.operands().tensors).backward_weight() is not None


def test_the_examples_are_short(guide):
    def num_lines(*titles):
        return sum(len(guide[title].splitlines()) for title in titles)

    assert num_lines("power_of_two/config.py", "power_of_two/stage.py") < 100
    assert num_lines("own_techniques/int8_forward.py", "own_techniques/int8_stages.py") < 100
    assert num_lines("own_techniques/confidence.py", "own_techniques/confidence_term.py") < 100


def test_every_page_of_the_navigation_exists():
    def pages(node):
        if isinstance(node, str):
            yield node
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from pages(child)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    missing = [page for page in pages(nav) if not (ROOT / "docs" / page).is_file()]
    assert not missing


@pytest.mark.parametrize("name", sorted(registry.TECHNIQUES))
def test_every_technique_has_a_page_with_its_paper(name):
    page = (ROOT / "docs/techniques" / f"{name}.md").read_text(encoding="utf-8")
    for identifier in re.findall(r"arXiv:(\d+\.\d+)", registry.TECHNIQUES[name].paper):
        assert identifier in page


@pytest.mark.parametrize("name", sorted(registry.TECHNIQUES))
def test_every_technique_has_its_configuration_in_the_reference(name):
    module = registry.TECHNIQUES[name].target.partition(":")[0]
    page = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    assert f"## {name}\n\n::: {module}\n" in page


def _keys_of_the_recipe():
    """Every dotted key that some recipe may have."""
    schema = recipe_schema()
    found = set()

    def walk(node, path):
        if not isinstance(node, dict):
            return
        if "$ref" in node:
            walk(schema["$defs"][node["$ref"].rpartition("/")[2]], path)
        for way in ("anyOf", "oneOf", "allOf"):
            for branch in node.get(way, []):
                walk(branch, path)
        for way in ("then", "else"):
            walk(node.get(way), path)
        for name, child in node.get("properties", {}).items():
            key = f"{path}.{name}" if path else name
            found.add(key)
            if key.count(".") < 3:
                walk(child, key)

    walk(schema, "")
    return found


def test_the_tables_for_those_who_come_from_elsewhere_name_keys_that_exist():
    text = (ROOT / "docs/guides/coming-from.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 50
    known, named = _keys_of_the_recipe(), 0
    for _, keys, note in rows:
        for key in re.findall(r"`([^`]+)`", keys):
            assert key in known, f"{key} is no key of a recipe"
            named += 1
        for written in re.findall(r"`- (\{[^`]+\})`", note):
            registry.parse_technique(yaml.safe_load(written))
    assert named > 60


def hook(name):
    """Load what the site's build runs."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / ".hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def built(module, path):
    """A page as a hook leaves it to the builder."""
    text = (ROOT / "docs" / path).read_text(encoding="utf-8")
    return module.on_page_markdown(text, page=SimpleNamespace(file=SimpleNamespace(src_uri=path)))


def test_the_reference_says_what_each_key_takes():
    text = built(hook("fields"), "reference/configuration.md")
    assert "::: " not in text
    anchors = re.findall(r"\{ #(\S+) \}", text)
    assert len(anchors) == len(set(anchors)) > 100
    assert set(re.findall(r"\]\(#([\w.]+)\)", text)) <= set(anchors)
    keys = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(len(re.split(r"(?<!\\)\|", line)) == 6 for line in keys)
    assert {line.split("|")[1].strip() for line in keys if not line.split("|")[-2].strip()} <= {"`type`"}
    assert "| `tokens_per_step` | integer >= 1 | `32768` | Tokens of one optimizer step" in text
    assert "| `loss` | `sigmoid`, `hinge`, `ipo`, `robust` | `sigmoid` |" in text
    assert "| `label_smoothing` | number >= 0, < 0.5 | `0` |" in text
    assert "| `max_grad_norm` | number > 0 or `null` | `1` | Clip gradients to this global norm; `null` does" in text


@pytest.mark.parametrize("name", sorted(registry.PASSES))
def test_every_pass_has_its_configuration_in_the_reference(name):
    module = registry.PASSES[name].target.partition(":")[0]
    assert f"::: {module}\n" in (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")


def test_the_table_of_engines_is_that_of_the_tests():
    methods = hook("methods")
    rows = list(methods.methods(""))[2:]
    assert len(rows) == len(registry.TECHNIQUES)
    (lisa,) = (row for row in rows if row.startswith("| [`lisa`]"))
    assert lisa.endswith("| yes | yes | yes | refused | refused | refused |")
    assert {methods.room_of(entry) for entry in registry.TECHNIQUES.values()} <= set(methods.ROOMS)
    for name, path in methods.OWN_TESTS.items():
        source = (ROOT / path).read_text(encoding="utf-8")
        assert name in source, f"{path} does not train {name}"
        assert "for name in ENGINES]" in source
    assert methods.UNKNOWN not in "".join(rows), "a technique that no test trains under an engine"
    assert built(methods, "index.md").count("](techniques/") > len(registry.TECHNIQUES)
    assert "<!--" not in built(methods, "reference/methods.md")


def test_the_drawing_has_every_slot_in_its_order():
    slots = hook("slots")
    drawing = slots.drawing()
    places = [drawing.index(f">{slot.name}<") for slot in slots.Slot]
    assert places == sorted(places)
    assert drawing in built(slots, "index.md")
    # An empty line would end the HTML in the page.
    assert "\n\n" not in drawing
    unknown = {name for names in slots.tenants().values() for name in names} - set(registry.TECHNIQUES)
    assert unknown == {"model.frozen_dtype"}


def test_the_change_log_names_the_version_to_come():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## Unreleased\n\nBecomes {leanmill.__version__} with the tag `v{leanmill.__version__}`.\n" in text


def test_every_fault_has_the_test_that_it_names():
    text = (ROOT / "docs/guides/faults.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)::(\w+)`(, slow)?", text)
    assert len(named) == sum(line.startswith("| ") for line in text.splitlines()) - 1
    for path, test, slow in named:
        source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        found = re.search(rf"((?:^@[^\n]*\n(?:^[ )][^\n]*\n)*)*)^def {test}\(", source, re.M)
        assert found, f"{path} has no {test}"
        is_slow = "pytest.mark.slow" in found[1] or bool(re.search(r"^pytestmark = .*pytest\.mark\.slow", source, re.M))
        # A parametrized one may be slow in part.
        assert is_slow == bool(slow) or "pytest.param(" in found[1], (path, test)
