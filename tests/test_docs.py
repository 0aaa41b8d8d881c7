"""The guide to adding a technique is followed to the letter, and the site's pages exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from leanmill.core import registry
from leanmill.core.sites import iter_sites
from leanmill.parallel.launch import Ranks
from tests.contract_cases import full_parameters, recipe_of, train


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
    exec(blocks["registry"], {"TECHNIQUES": registry.TECHNIQUES, "Entry": registry.Entry})
    yield blocks
    for name in [name for name in sys.modules if name.split(".")[0] == "power_of_two"]:
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
