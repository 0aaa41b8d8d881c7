"""Several runs on one page."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from leanmill.core.errors import ConfigError
from leanmill.report.page.compare import TIME, TOKENS, write_comparison
from tests.report.page.chromium import BINARY, open_page
from tests.report.page.test_html import _check


def write_run(folder, *, name, lr, losses, seconds=10.0, techniques=()):
    """A run with an evaluation after every step, resumed after its first one with a pause of an hour."""
    folder.mkdir(parents=True)
    facts = {"name": name, "num_parameters": 1_000_000, "num_trainable": 1_000_000, "techniques": list(techniques)}
    records = [{"kind": "start", "start_step": 0, "time": 100.0, **facts}]
    now = 100.0
    for step, loss in enumerate(losses, start=1):
        now += seconds
        scores = {"loss": loss, "perplexity": 1.0, "bits_per_byte": loss / 2, "order0_bits_per_byte": 5.0}
        common = {"step": step, "tokens": 1000 * step, "time": now}
        records.append({"kind": "step", **common, "losses": {"total": loss + 0.5}, "tokens_per_second": 100.0})
        records.append({"kind": "eval", **common, "domains": {"python": scores, "all": scores}})
        if step == 1:
            now += 3600
            records.append({"kind": "start", "start_step": 1, "time": now, **facts})
    records.append({"kind": "end", "status": "finished", "time": now})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    recipe = {"name": name, "run_dir": str(folder), "optimizer": {"type": "adamw", "lr": lr, "weight_decay": 0.1}}
    recipe["techniques"] = [{"type": technique} for technique in techniques]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def page(tmp_path):
    one = write_run(tmp_path / "one", name="dense", lr=1e-3, losses=[5.0, 4.0, 3.0])
    two = write_run(tmp_path / "two", name="sparse <b>", lr=2e-3, losses=[5.5, 4.5], techniques=["nm_sparsity"])
    return write_comparison([one, two], tmp_path / "comparison.html")


def test_a_run_that_diverged_is_compared_too(tmp_path):
    one, two = (write_run(tmp_path / name, name=name, lr=1e-3, losses=[3.0, 2.0]) for name in ("kept", "lost"))
    records = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "eval" and record["step"] == 2:
            record["domains"]["all"] |= {"loss": None, "perplexity": None, "bits_per_byte": None}
    (two / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = write_comparison([one, two], tmp_path / "comparison.html").read_text()
    assert "<td>2.0000</td><td>—</td>" in text
    assert "<td>2.0000 at step 2</td><td>3.0000 at step 1</td>" in text


def values_of(text):
    return json.loads(text.split('id="values">')[1].split("</script>")[0])


def test_curves_over_tokens_and_over_time_without_pauses(page):
    charts = values_of(page.read_text())["charts"]
    assert set(charts) == {f"{axis.name}-{kind}" for axis in (TOKENS, TIME) for kind in ("training", "val-0")}
    over_tokens, over_time = charts["tokens-val-0"], charts["time-val-0"]
    assert over_tokens["axis"] == "tokens"
    assert over_tokens["series"][0] == {"x": [1000, 2000, 3000], "y": [5.0, 4.0, 3.0]}
    assert over_tokens["series"][1] == {"x": [1000, 2000], "y": [5.5, 4.5]}
    assert over_time["series"][0]["x"] == [10, 20, 30]


def test_says_what_recipes_differ_in_and_nothing_else(page):
    text = page.read_text()
    read = _check(text)
    shown = "".join(read.text)
    assert "sparse <b>" in shown
    assert "<b>" not in text.replace("&lt;b&gt;", "")
    rows = text.split("What the recipes differ in")[1]
    assert "optimizer.lr" in rows
    assert "techniques.nm_sparsity" in rows
    assert "weight_decay" not in rows
    assert "run_dir" not in rows
    assert "3.0000 at step 3" in shown


def test_runs_of_one_name_go_by_their_folders(tmp_path):
    runs = [write_run(tmp_path / at / "run", name="same", lr=1e-3, losses=[3.0]) for at in ("a", "b")]
    text = write_comparison(runs, tmp_path / "out.html").read_text()
    assert str(tmp_path / "a" / "run") in text
    assert "Nothing but where they lie" in text


def test_refuses_one_run_twice_and_more_than_can_be_told_apart(tmp_path):
    one = write_run(tmp_path / "one", name="one", lr=1e-3, losses=[3.0])
    with pytest.raises(ConfigError, match="named twice"):
        write_comparison([one, tmp_path / "two" / ".." / "one"], tmp_path / "out.html")
    with pytest.raises(ConfigError, match="name 2 to 12 folders"):
        write_comparison([tmp_path / str(number) for number in range(13)], tmp_path / "out.html")


EXERCISE = """<script>
const plot = document.querySelector('[data-chart="tokens-val-0"] .plot'), box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 0.34 * box.width}));
const figures = [...document.querySelectorAll("[data-chart]")];
document.documentElement.setAttribute("data-answers", [
  figures.filter((figure) => !figure.querySelector(".cursor").hidden).map((figure) => figure.dataset.chart).join(" "),
  plot.closest("figure").querySelector(".at").textContent,
  plot.closest("figure").querySelector("output").textContent,
  document.documentElement.scrollWidth <= document.documentElement.clientWidth,
].join("|"));
</script>"""


@pytest.mark.skipif(BINARY is None, reason="no Chromium on PATH; apt-get install chromium")
@pytest.mark.parametrize("width", [400, 1280])
def test_charts_over_the_same_share_a_cursor_in_a_browser(page, width):
    assert open_page(page).console == []
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    page.write_text(text.replace("</body>", EXERCISE + "</body>"))
    dom = open_page(page, f"--window-size={width},900").dom
    answers = re.search(r'data-answers="([^"]*)"', dom).group(1).split("|")
    assert answers == ["tokens-training tokens-val-0", "1k tokens", "5", "true"]
