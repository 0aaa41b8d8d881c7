"""The report in a browser: no script error, and every control does what it says."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.page.html import write_report
from tests.report.page.chromium import BINARY, open_page
from tests.trainer.fake_run import fake_info, fake_recipe, fake_step, fake_study, play, with_experts


pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium on PATH; apt-get install chromium")

HOOK = """<script>
window.addEventListener("error", (event) => document.documentElement.setAttribute("data-errors",
  (document.documentElement.getAttribute("data-errors") || "") + event.message + ";"));
</script>"""

EXERCISE = """<script>
const answers = {};
const text = (selector) => [...document.querySelectorAll(selector)].map((node) => node.textContent);
for (const figure of document.querySelectorAll("[data-chart]")) {
  const plot = figure.querySelector(".plot"), box = plot.getBoundingClientRect();
  for (const share of [-0.1, 0, 0.5, 0.999, 1.2])
    plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + share * box.width, clientY: box.top + 5}));
  for (const key of ["Home", "ArrowLeft", "ArrowRight", "End", "ArrowRight", "a"])
    plot.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
  plot.focus();
  plot.blur();
}
const lr = document.querySelector('[data-chart="lr"]');
if (lr) {
  const plot = lr.querySelector(".plot"), box = plot.getBoundingClientRect();
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.left + 0.5 * box.width}));
  answers.lrAtMiddle = lr.querySelector("output").textContent;
  answers.cursors = [...document.querySelectorAll(".cursor")].filter((cursor) => !cursor.hidden).length;
  answers.at = lr.querySelector(".at").textContent;
  plot.dispatchEvent(new PointerEvent("pointerleave"));
  answers.lrAtRest = lr.querySelector("output").textContent;
  answers.cursorsAtRest = [...document.querySelectorAll(".cursor")].filter((cursor) => !cursor.hidden).length;
}
const select = document.getElementById("site");
if (select) {
  const path = () => document.querySelector(".bars").getAttribute("d");
  const first = path();
  for (const option of select.options) {
    select.value = option.value;
    select.dispatchEvent(new Event("change"));
  }
  answers.histogramChanged = path() !== first;
  answers.histogramText = document.getElementById("histogram-text").textContent;
  const linear = path(), log = document.getElementById("log-counts");
  log.checked = true;
  log.dispatchEvent(new Event("change"));
  answers.logChanged = path() !== linear;
  log.checked = false;
  document.querySelector('[data-site="0"]').click();
  answers.rowSelects = select.value === "0" && path() === first;
}
for (const figure of document.querySelectorAll("[data-heat]")) {
  const plot = figure.querySelector(".plot"), box = plot.getBoundingClientRect();
  for (const share of [-0.1, 0, 0.5, 0.999, 1.2]) {
    const clientX = box.left + share * box.width, clientY = box.top + share * box.height;
    plot.dispatchEvent(new PointerEvent("pointermove", {clientX, clientY}));
  }
  for (const key of ["ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown", "a"])
    plot.dispatchEvent(new KeyboardEvent("keydown", {key, cancelable: true}));
  plot.dispatchEvent(new PointerEvent("pointerleave"));
}
const load = document.querySelector('[data-heat="load"]');
if (load) {
  const plot = load.querySelector(".plot"), box = plot.getBoundingClientRect(), out = load.querySelector(".read-out");
  answers.resting = out.textContent;
  plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 2, clientY: box.bottom - 2}));
  answers.corner = out.textContent;
  answers.cellShown = !load.querySelector(".cell").hidden;
  plot.dispatchEvent(new PointerEvent("pointerleave"));
  answers.restsAgain = out.textContent === answers.resting;
  const paths = () => document.querySelector('[data-heat="domains"] svg').innerHTML.replaceAll("></path>", "/>");
  const first = paths(), layer = document.getElementById("layer");
  layer.value = "2";
  layer.dispatchEvent(new Event("change"));
  answers.layerChanged = paths() !== first;
  layer.value = "0";
  layer.dispatchEvent(new Event("change"));
  answers.drawsAsWritten = [...paths().matchAll(/M/g)].length === [...first.matchAll(/M/g)].length
    && [...first.matchAll(/d="([^"]*)"/g)].every((found) => paths().includes(found[1]));
}
answers.overflow = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.documentElement.setAttribute("data-answers", JSON.stringify(answers));
</script>"""


def _attribute(dom: str, name: str) -> str:
    found = re.search(rf'<html[^>]*\s{name}="([^"]*)"', dom)
    return unescape(found.group(1)) if found else ""


def _exercise(page: Path, *flags: str) -> dict[str, object]:
    """Open a copy with an error hook in front and made-up user input behind; return what it saw."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', HOOK, text, count=1)
    copy = page.with_name("exercised.html")
    copy.write_text(text.replace("</body>", f"{EXERCISE}</body>"), encoding="utf-8")
    opened = open_page(copy, *flags)
    assert _attribute(opened.dom, "data-errors") == ""
    assert opened.console == []
    return json.loads(_attribute(opened.dom, "data-answers"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    recipe = fake_recipe(run_dir, name='it\'s <b>"quoted"<!--')
    (run_dir / "recipe.yaml").write_text("name: fake\n" * 30)
    observers = [JsonlLog(run_dir), SiteStatistics(run_dir)]
    play(observers, fake_info(recipe, run_dir), until=230, status=None)
    play(observers, fake_info(recipe, run_dir, start_step=200), until=400, skip_at=310)
    return write_report(run_dir)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a mixture of experts, with a study of its routing."""
    run_dir = tmp_path_factory.mktemp("mixture")
    recipe = fake_recipe(run_dir)
    play([JsonlLog(run_dir)], fake_info(recipe, run_dir), until=400, change=with_experts)
    (run_dir / "routing.json").write_text(json.dumps(fake_study(400)))
    return write_report(run_dir)


def test_the_page_as_written_runs_its_script_under_its_own_policy(report: Path) -> None:
    opened = open_page(report)
    assert opened.console == []
    # The script marks the chosen site: without it the attribute is not there.
    assert re.search(r'<tr data-site="0" class="chosen">', opened.dom)


@pytest.mark.parametrize("width", [1280, 500])
def test_heatmaps_read_out_their_cells_and_follow_the_layer(mixture: Path, width: int) -> None:
    answers = _exercise(mixture, f"--window-size={width},900")
    assert str(answers["resting"]).startswith("smallest 0 at layer 4, expert 7")
    assert answers["corner"] == "0 at layer 4, expert 7"
    assert answers["cellShown"]
    assert answers["restsAgain"]
    assert answers["layerChanged"]
    assert answers["drawsAsWritten"]
    assert answers["overflow"] is False


def test_every_control_works(report: Path) -> None:
    answers = _exercise(report, "--window-size=1280,900")
    at = re.fullmatch(r"step (\d+)", str(answers["at"]))
    assert at is not None
    assert abs(int(at.group(1)) - 200) <= 2
    assert float(str(answers["lrAtMiddle"])) == pytest.approx(fake_step(int(at.group(1))).lr, rel=0.01)
    assert answers["lrAtRest"] == "3e-4"
    assert answers["cursors"] == 10
    assert answers["cursorsAtRest"] == 0
    assert answers["histogramChanged"]
    assert answers["logChanged"]
    assert answers["rowSelects"]
    assert str(answers["histogramText"]).startswith("model.layers.1.down_proj")


@pytest.mark.parametrize("width", [1600, 800, 500])
def test_no_width_scrolls_sideways(report: Path, width: int) -> None:
    assert _exercise(report, f"--window-size={width},900")["overflow"] is False


@pytest.mark.parametrize("num_records", [0, 1])
def test_hardly_any_data_is_no_error(tmp_path: Path, num_records: int) -> None:
    log = JsonlLog(tmp_path)
    if num_records:
        log.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
        log.on_step(fake_step(1))
    _exercise(write_report(tmp_path))


def test_an_error_would_be_seen(report: Path) -> None:
    broken = report.with_name("broken.html")
    text = report.read_text(encoding="utf-8").replace("const nearest =", "const farthest =")
    broken.write_text(text.replace('http-equiv="Content-Security-Policy"', "name=none"), encoding="utf-8")
    text = broken.read_text(encoding="utf-8")
    broken.write_text(re.sub(r"<meta name=none[^>]*>", HOOK, text).replace("</body>", f"{EXERCISE}</body>"))
    opened = open_page(broken)
    assert "nearest is not defined" in _attribute(opened.dom, "data-errors")
    assert any("nearest is not defined" in line for line in opened.console)
