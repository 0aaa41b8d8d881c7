"""The pages of figures are made of results, a column a kind of processor."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from leanmill.core.registry import parse_pass
from leanmill.recipe.io import load_recipe


FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "perf"))
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def figures(monkeypatch):
    return load(FOLDER / "figures.py", monkeypatch)


def test_the_pages_are_those_of_the_results(figures, capsys, tmp_path, monkeypatch):
    pages = ("kernels/figures.md", "reference/figures.md", "reference/claims.md")
    committed = {name: (figures.ROOT / "docs" / name).read_text() for name in pages}
    for name in committed:
        (tmp_path / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    figures.main()
    for name, text in committed.items():
        assert (tmp_path / "docs" / name).read_text() == text, "run python benchmarks/figures.py"


def test_a_second_kind_is_a_second_column_with_its_conditions(figures, tmp_path, monkeypatch):
    machine = load(FOLDER / "perf" / "machine.py", monkeypatch)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    kernel = {"ratio": 0.5, "ours_ms": 1.0, "peer_ms": 2.0, "limit": 0.6, "peer": "torch", "conditions": "small"}
    for kind, ratio in (("amx", 0.7), ("avx2", 0.5)):
        monkeypatch.setattr(machine, "kind", lambda kind=kind: kind)
        compiled = {"ratio_to_compiled": 0.25, "compiled_ms": 4.0} if kind == "amx" else {}
        machine.write_result("kernels_some", {"some": kernel | compiled | {"ratio": ratio}}, machine.conditions())
    assert figures.kinds() == ["avx2", "amx"]
    head, _, row = figures.kernel_table()
    assert head == "| operation | conditions | peer | target | AVX2 | AVX-512 with AMX |"
    assert row == "| some | small | torch | <= 0.6 | 0.5 (1 / 2 ms) | **0.7** (1 / 2 ms); 0.25 |"
    (line,) = figures.conditions("amx")
    under = json.loads((tmp_path / "amx" / "kernels_some.json").read_text())["conditions"]
    for key in ("date", "processor", "torch_cpu_capability", "command"):
        assert under[key] in line
    assert f"`{' '.join(under['processor_flags'])}`" in line
    assert f"torch {under['versions']['torch']}" in line


def test_orders_of_claims_are_what_the_seeds_resolve(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "claims"))
    run = load(FOLDER / "claims" / "run.py", monkeypatch)
    losses = {"a": [1.0, 1.1, 1.2], "b": [1.3, 1.4, 1.5], "c": [1.35, 1.2, 1.6], "d": [0.1, 0.2, 0.3]}
    found = [(order["better"], order["worse"], order["verdict"]) for order in run.orders(losses)]
    assert found == [("a", "b", "holds"), ("b", "c", "unresolved"), ("c", "d", "fails")]
    assert run.orders(losses)[0]["gap"] == pytest.approx(0.3)
    assert run.orders(losses)[1]["spread"] == pytest.approx(0.3)
    assert (
        run.orders({"a": [1.0, 3.0], "b": [1.1, 5.0]})[0]["verdict"] == "unresolved"
    )  # below, by what seeds differ in


def test_a_rise_is_above_the_least_so_far(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "claims"))
    run = load(FOLDER / "claims" / "run.py", monkeypatch)
    falling = [5.0 - place / 20 for place in range(40)]
    assert run.rise(falling) < 0
    jump = [*falling[:20], 9.0, 9.0, 9.0, 9.0, *falling[20:]]
    assert run.rise(jump) == pytest.approx(9.0 - sum(falling[16:20]) / 4)
    assert run.rise([3.0, float("nan"), 2.0]) != run.rise([3.0, float("nan"), 2.0])
    assert run.rise([3.0]) == 0


def test_every_variant_of_a_claim_is_a_recipe(monkeypatch):
    claims = load(FOLDER / "claims" / "claims.py", monkeypatch)
    for claim in claims.CLAIMS.values():
        for variant in claim.variants.values():
            given = [f"techniques={json.dumps(variant.techniques)}", *variant.settings]
            assert load_recipe(FOLDER / "claims" / claim.base, given).train.steps == 450
            passes = [*(variant.passes or ()), *(variant.afterwards or ()), *(variant.beside or ())]
            assert all(parse_pass(item) for item in passes)
        assert {bound.variant for bound in claim.bounds} <= claim.variants.keys()
        assert {bound.what for bound in claim.bounds} <= claim.also.keys()


def test_a_claims_section_has_its_losses_and_verdicts(figures):
    name = next(iter(figures.CLAIMS))
    losses = {"quest": [1.0, 2.0], "lsq": [3.0, 4.0]}
    order = {"better": "quest", "worse": "lsq", "gap": 2.0, "spread": 0.5, "verdict": "holds"}
    under = {"date": "2026-01-01", "processor": "some"}
    also = {"load": {"quest": [5.0, 6.0], "lsq": [7.0, 8.0]}}
    found = {"losses": losses, "orders": [order], "steps": 7, "also": also}
    text = figures.claim_section(name, {"figures": found, "conditions": under})
    assert "| variant | losses of seeds | mean | load |\n|---|---|---|---|" in text
    assert "| quest | 1.000, 2.000 | 1.500 | 5.500 |" in text
    assert "quest below lsq by 2.000, which seeds differ in by 0.500: **holds**" in text
    bound = {"variant": "quest", "what": "load", "limit": 5.5, "most": 6.0, "holds": False}
    text = figures.claim_section(name, {"figures": found | {"bounds": [bound]}, "conditions": under})
    assert "quest: load 6.000 at most, allowed 5.5: **fails**" in text
