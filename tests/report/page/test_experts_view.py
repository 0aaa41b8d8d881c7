from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.page.data import load_run
from leanmill.report.page.experts_view import experts_section
from leanmill.report.page.html import write_report
from leanmill.report.page.layers_view import layers_section
from tests.trainer.fake_run import fake_experts, fake_info, fake_recipe, play, with_experts


def mixture(run_dir: Path) -> Path:
    play([JsonlLog(run_dir)], fake_info(fake_recipe(run_dir), run_dir), until=150, change=with_experts)
    return run_dir


def test_loads_are_those_of_the_last_evaluation(tmp_path):
    section = experts_section(load_run(mixture(tmp_path)))
    assert section is not None
    load, domains, time = section.heats
    table = fake_experts(150)["domains"]
    counts = [sum(layers[2][e] for layers in table.values()) for e in range(8)]
    assert load.cells[2] == pytest.approx([count / (sum(counts) / 8) for count in counts])
    assert load.rows == ["1", "2", "3", "4"]
    assert load.cells[3][7] == 0
    python = table["python"][0]
    assert domains.rows == ["python", "cpp", "english"]
    assert domains.cells[0] == pytest.approx([count / (sum(python) / 8) for count in python])
    assert time.columns == ["50", "100", "150"]
    assert [row[-1] for row in time.cells] == pytest.approx(load.cells[0])
    assert section.by_layer[1][0].cells[0] == pytest.approx(
        [c / (sum(table["python"][1]) / 8) for c in table["python"][1]]
    )


def test_metrics_by_layer_are_a_heatmap_and_no_charts(tmp_path):
    run = load_run(mixture(tmp_path))
    section = layers_section(run)
    assert section is not None
    (heat,) = section.heats
    assert heat.rows == ["1", "2", "3", "4"]
    assert (heat.columns[0], heat.columns[-1]) == ("2", "150")
    assert heat.cells[1][-1] == pytest.approx(3 / (2 + 10 * 150 / 400))
    page = write_report(tmp_path).read_text()
    assert "experts/max_violation</span>" in page
    assert "experts/max_violation/1</span>" not in page


def test_metrics_that_are_0_everywhere_have_no_heatmap(tmp_path):
    def without_drops(record):
        record = with_experts(record)
        drops = {"experts/drop_rate": 0.0, "experts/drop_rate/1": 0.0}
        return replace(record, metrics={**record.metrics, **drops}) if hasattr(record, "losses") else record

    play([JsonlLog(tmp_path)], fake_info(fake_recipe(tmp_path), tmp_path), until=50, change=without_drops)
    section = layers_section(load_run(tmp_path))
    assert section is not None
    assert [heat.title for heat in section.heats] == ["experts: max violation"]
    assert "experts/drop_rate</span>" in write_report(tmp_path).read_text()


def test_dense_runs_have_neither(tmp_path):
    play([JsonlLog(tmp_path)], fake_info(fake_recipe(tmp_path), tmp_path), until=100)
    run = load_run(tmp_path)
    assert experts_section(run) is None
    assert layers_section(run) is None


def test_a_domain_without_tokens_has_no_cells(tmp_path):
    def silent(record):
        record = with_experts(record)
        for table in getattr(record, "tables", {}).values():
            table["domains"]["cpp"] = [[0] * 8 for _ in range(4)]
        return record

    play([JsonlLog(tmp_path)], fake_info(fake_recipe(tmp_path), tmp_path), until=50, change=silent)
    section = experts_section(load_run(tmp_path))
    assert section is not None
    assert section.heats[1].cells[1] == [None] * 8
    write_report(tmp_path)


def test_evaluations_of_other_experts_are_left_out(tmp_path):
    """A run whose experts were changed on the way shows those it has now."""
    mixture(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    first = next(record for record in records if record["kind"] == "eval")
    first["tables"]["experts"] = fake_experts(50, num_experts=4)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    section = experts_section(load_run(tmp_path))
    assert section is not None
    assert section.heats[2].columns == ["100", "150"]
