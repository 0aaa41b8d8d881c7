"""The notebook under docs/ runs from its first cell to its last, and its page shows the same cells."""

import ast
import json
from pathlib import Path

import pytest


GUIDES = Path(__file__).resolve().parents[1] / "docs" / "guides"


def cells():
    notebook = json.loads((GUIDES / "notebook.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    shown = []
    for code in cells():
        *statements, last = _parsed(code)
        for one in statements:
            exec(one, names)
        shown.append(eval(last, names) if _is_value(last) else exec(last, names))
    assert shown[1] == sum(p.numel() for p in names["plain"].parameters())
    assert shown[2][0] == 20
    assert shown[3] is True
    assert shown[5] == pytest.approx(0.5, abs=0.02)


def _parsed(code):
    return [ast.unparse(node) for node in ast.parse(code).body]


def _is_value(statement):
    return isinstance(ast.parse(statement).body[0], ast.Expr)


def test_its_page_shows_its_cells():
    page = (GUIDES / "notebook.md").read_text(encoding="utf-8")
    for code in cells():
        assert f"```python\n{code}\n```" in page
