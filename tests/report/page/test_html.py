from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from leanmill.core.errors import ConfigError
from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.page.html import write_report
from tests.trainer.fake_run import fake_eval, fake_info, fake_recipe, fake_step, play


VOID = {"meta", "link", "input", "br", "path"}
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&<b>"


class Checker(HTMLParser):
    """Fails on elements that are not closed in order, and collects what the tests ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def _run(run_dir: Path, **changes) -> str:
    recipe = fake_recipe(run_dir, name=changes.pop("name", "fake"))
    (run_dir / "recipe.yaml").write_text(changes.pop("recipe_text", "name: fake\n"), encoding="utf-8")
    until, skip_at = changes.pop("until", 100), changes.pop("skip_at", -1)
    play(
        [JsonlLog(run_dir), SiteStatistics(run_dir)],
        fake_info(recipe, run_dir, **changes),
        until=until,
        skip_at=skip_at,
    )
    return write_report(run_dir).read_text(encoding="utf-8")


def _charts(page: str) -> dict[str, dict]:
    found = re.search(r'<script type="application/json" id="values">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found.group(1))["charts"]


def test_page_is_well_formed_and_holds_every_figure(tmp_path: Path) -> None:
    page = _run(tmp_path, skip_at=60)
    checker = _check(page)
    shown = {attributes.get("data-chart") for tag, attributes in checker.seen if tag == "figure"}
    assert {"loss", "val", "bpb", "lr", "grad", "speed", "mfu", "time", "memory"} <= shown
    text = "".join(checker.text)
    for expected in (
        "finished",
        "nm_sparsity + ternary",
        "engine single: one process",
        "torch ",
        "Seed",
        "skipped for",
        "TFLOP/s",
    ):
        assert expected in text


def test_nothing_is_fetched_from_anywhere(tmp_path: Path) -> None:
    page = _run(tmp_path)
    for tag, attributes in _check(page).seen:
        for name in ("src", "href", "data", "action", "poster", "srcset"):
            assert attributes.get(name, "data:,") == "data:,", (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None
    assert "url(" not in style.group(1)
    assert "@import" not in style.group(1)


def test_only_the_page_s_own_script_may_run(tmp_path: Path) -> None:
    page = _run(tmp_path)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "")  # a recipe's name is a folder name
    page = _run(tmp_path, name=name, notes=(HOSTILE,), recipe_text=f"name: {HOSTILE}\n")
    statistics = json.loads((tmp_path / "sites.json").read_text())
    statistics["sites"][0]["name"] = HOSTILE
    (tmp_path / "sites.json").write_text(json.dumps(statistics))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    checker = _check(page)
    assert not any(tag in ("img", "b") for tag, _ in checker.seen)
    assert sum(tag == "script" for tag, _ in checker.seen) == 2
    assert "".join(checker.text).count(HOSTILE) >= 4
    assert name in "".join(checker.text)


def test_credentials_never_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "swordfish-swordfish")
    key = "hf_" + "aB3" * 11
    page = _run(tmp_path, notes=("with swordfish-swordfish",), recipe_text=f"path: https://me:{key}@host/x\n")
    assert "swordfish" not in page
    assert key not in page
    assert "[redacted]" in page


def test_values_at_the_cursor_are_those_of_the_run(tmp_path: Path) -> None:
    charts = _charts(_run(tmp_path))
    lr = charts["lr"]["series"][0]
    assert lr["x"] == list(range(2, 101, 2))
    assert lr["y"][9] == pytest.approx(fake_step(20).lr, rel=1e-5)
    domains = fake_eval(100).domains
    assert [series["y"][-1] for series in charts["bpb"]["series"]] == pytest.approx(
        [domains[name].bits_per_byte for name in ("python", "cpp", "english", "all")], rel=1e-5
    )


def test_order_0_is_drawn_for_every_domain(tmp_path: Path) -> None:
    page = _run(tmp_path)
    figure = page[page.index('id="chart-bpb"') :]
    figure = figure[: figure.index("</figure>")]
    assert figure.count('class="line c') - figure.count('class="key"') == 8
    assert figure.count("dashed") == 4
    assert "python 4.71, cpp 4.90, english 4.60, all 4.74" in figure


def test_total_and_cross_entropy_are_one_line_where_they_are_one_number(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path)
    log.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
    log.on_step(fake_step(1, losses={"total": 2.0, "cross_entropy": 2.0}))
    charts = _charts(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(charts["loss"]["series"]) == 1
    log.on_step(fake_step(2, losses={"total": 2.5, "cross_entropy": 2.0}))
    charts = _charts(write_report(tmp_path).read_text(encoding="utf-8"))
    assert len(charts["loss"]["series"]) == 2


def test_a_resume_is_marked_and_a_rebuilt_report_covers_both_sessions(tmp_path: Path) -> None:
    info = fake_info(fake_recipe(tmp_path), tmp_path)
    play([JsonlLog(tmp_path)], info, until=70, status=None)
    assert "event resume" not in write_report(tmp_path).read_text(encoding="utf-8")
    page = _run(tmp_path, start_step=50, until=100)
    assert "event resume" in page
    assert "Resumed at step 50" in page
    assert _charts(page)["time"]["series"][0]["x"] == list(range(2, 101, 2))


def test_an_empty_folder_gives_a_page(tmp_path: Path) -> None:
    page = write_report(tmp_path).read_text(encoding="utf-8")
    _check(page)
    assert "No values yet." in page
    assert "No evaluation yet." in page


def test_a_single_record_gives_a_page_with_a_dot(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path)
    log.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
    log.on_step(fake_step(1))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    _check(page)
    assert 'class="dot' in page


def test_non_finite_values_leave_gaps(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path)
    log.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
    for step in range(1, 5):
        log.on_step(fake_step(step, grad_norm=float("nan") if step == 3 else 1.0))
    log.on_end("failed", "RunError: non-finite loss in step 3")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert _charts(page)["grad"]["series"][0]["x"] == [1, 2, 4]
    assert "non-finite loss in step 3" in page


def test_an_unknown_peak_leaves_mfu_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanmill.models.flops.peak_flops_per_second", lambda device, precision: None)
    page = _run(tmp_path)
    assert "chart-mfu" not in page
    assert "peak FLOP/s of this device is not known" in page


def test_a_long_run_stays_small(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path)
    log.on_start(fake_info(fake_recipe(tmp_path), tmp_path, num_steps=6000))
    for step in range(1, 6001):
        log.on_step(fake_step(step, 6000))
    assert write_report(tmp_path).stat().st_size < 700_000


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is no folder; give the run_dir"):
        write_report(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_order_0_spans_the_chart_with_a_single_evaluation(tmp_path: Path) -> None:
    page = _run(tmp_path, until=50)
    figure = page[page.index('id="chart-bpb"') :]
    figure = figure[: figure.index("</figure>")]
    lines = re.findall(r'class="line c\d dashed" d="M0.0 ([\d.]+)L1000.0 ([\d.]+)"', figure)
    assert len(lines) == 4
    assert all(left == right for left, right in lines)
