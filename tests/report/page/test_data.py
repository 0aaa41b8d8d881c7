from __future__ import annotations

import json
from pathlib import Path

from leanmill.checkpoint.manifest import Manifest, write_manifest
from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.page.data import keys, load_run, points
from tests.trainer.fake_run import fake_info, fake_recipe, play


def _write(run_dir: Path, *records: dict) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_an_empty_folder_is_an_empty_run(tmp_path: Path) -> None:
    run = load_run(tmp_path)
    assert (run.facts, run.steps, run.sites, run.recipe, run.status) == ({}, [], {}, "", "running")


def test_resumes_and_skips_are_found(tmp_path: Path) -> None:
    recipe = fake_recipe(tmp_path)
    play([JsonlLog(tmp_path)], fake_info(recipe, tmp_path), until=70, status=None)
    play([JsonlLog(tmp_path)], fake_info(recipe, tmp_path, start_step=50), until=100, skip_at=81)
    run = load_run(tmp_path)
    assert run.resumed_at == [50]
    assert run.skipped_at == [82]
    assert run.status == "finished"
    assert len(run.steps) == 50


def test_wall_time_adds_up_sessions_without_the_gap_between_them(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {"kind": "start", "time": 1000, "start_step": 0},
        {"kind": "step", "step": 1, "time": 1010},
        {"kind": "step", "step": 2, "time": 1020},
        {"kind": "start", "time": 5000, "start_step": 1},
        {"kind": "step", "step": 2, "time": 5007},
        {"kind": "end", "status": "stopped", "time": 5009},
    )
    run = load_run(tmp_path)
    assert run.seconds == 29
    assert run.status == "stopped"


def test_points_leave_out_what_is_missing_or_null(tmp_path: Path) -> None:
    records = [
        {"step": 1, "losses": {"total": 2.0}},
        {"step": 2, "losses": {"total": None}},
        {"step": 3, "losses": {"total": 1.0, "distill": 0.5}},
        {"step": 4},
    ]
    assert points(records, "losses", "total") == [(1.0, 2.0), (3.0, 1.0)]
    assert points(records, "losses", "distill") == [(3.0, 0.5)]
    assert keys(records, "losses") == ["total", "distill"]


def test_a_damaged_statistics_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "sites.json").write_text('{"sites": [')
    assert load_run(tmp_path).sites == {}


def test_checkpoints_on_disk_are_those_a_resume_would_look_at(tmp_path):
    for sequence, name in enumerate(["step-00000004", "step-00000006.tmp", "step-00000002"]):
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        write_manifest(folder, Manifest(step=2, sequence=sequence))
    assert load_run(tmp_path).on_disk == ["step-00000002", "step-00000004"]
