from __future__ import annotations

import json
from pathlib import Path

import pytest

from leanmill.core.errors import RunError
from leanmill.report.loggers.jsonl import JsonlLog
from leanmill.report.records import FILE_NAME, read_records, repair, without_superseded
from tests.trainer.fake_run import fake_eval, fake_info, fake_recipe, fake_step, play


def _log(run_dir: Path, *, start_step: int = 0, until: int = 100, status: str | None = "finished", **changes) -> Path:
    info = fake_info(fake_recipe(run_dir), run_dir, start_step=start_step, **changes)
    play([JsonlLog(run_dir)], info, until=until, status=status)
    return run_dir / FILE_NAME


def test_every_record_is_a_strict_json_line(tmp_path: Path) -> None:
    path = _log(tmp_path, until=60)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines[:2]] == ["start", "step"]
    assert {line["kind"] for line in lines} == {"start", "step", "eval", "checkpoint", "end"}
    assert all(line["time"] > 1e9 for line in lines)
    step = next(line for line in lines if line.get("step") == 10)
    assert step["losses"] == pytest.approx(fake_step(10).losses)
    evaluation = next(line for line in lines if line["kind"] == "eval")
    assert evaluation["domains"]["cpp"]["bits_per_byte"] == pytest.approx(fake_eval(50).domains["cpp"].bits_per_byte)


def test_a_line_is_on_disk_as_soon_as_it_is_told(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path)
    log.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
    log.on_step(fake_step(2))
    assert [r["kind"] for r in read_records(tmp_path / FILE_NAME)] == ["start", "step"]


def test_start_says_what_ran(tmp_path: Path) -> None:
    start = read_records(_log(tmp_path, until=2))[0]
    assert start["seed"] == 7
    assert start["techniques"] == ["nm_sparsity", "ternary"]
    assert start["versions"]["torch"]
    assert start["peak_flops_per_second"] > 0


def test_mfu_is_the_stated_formula(tmp_path: Path) -> None:
    start, step = read_records(_log(tmp_path, until=2))[:2]
    expected = step["tokens_per_second"] * start["flops_per_token"] / (2 * start["peak_flops_per_second"])
    assert step["mfu"] == pytest.approx(expected)


def test_resume_supersedes_the_steps_it_does_again(tmp_path: Path) -> None:
    _log(tmp_path, until=74, status=None)
    path = _log(tmp_path, start_step=50, until=100)
    records = read_records(path)
    assert sum(r.get("step") == 60 and r["kind"] == "step" for r in records) == 2
    kept = without_superseded(records)
    assert [r["step"] for r in kept if r["kind"] == "step"] == list(range(2, 101, 2))
    assert [r["step"] for r in kept if r["kind"] == "eval"] == [50, 100]
    assert [r["start_step"] for r in kept if r["kind"] == "start"] == [0, 50]


def test_a_torn_line_is_tolerated_and_cut_on_resume(tmp_path: Path) -> None:
    path = _log(tmp_path, until=54, status=None)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "step", "step": 56, "loss')
    assert read_records(path)[-1]["step"] == 54
    _log(tmp_path, start_step=50, until=60)
    assert path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b"torn", b""),
        (b"a\n", b"a\n"),
        (b"a\n" + b"x" * 200_000, b"a\n"),
        (b"x" * 70_000 + b"\nb", b"x" * 70_000 + b"\n"),
    ],
)
def test_repair_keeps_whole_lines_only(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(before)
    repair(path)
    assert path.read_bytes() == after


def test_non_finite_values_become_null(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path)
    log.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
    log.on_step(fake_step(2, grad_norm=float("nan"), losses={"total": float("inf")}))
    record = read_records(tmp_path / FILE_NAME)[-1]
    assert record["grad_norm"] is None
    assert record["losses"] == {"total": None}


def test_credentials_do_not_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "swordfish-swordfish")
    path = _log(tmp_path, until=2, status=None, notes=("logged in with swordfish-swordfish",))
    JsonlLog(tmp_path).on_end("failed", "never started, writes nothing")
    assert "swordfish" not in path.read_text()
    assert "never started" not in path.read_text()


def test_a_full_disk_is_one_clear_line(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path)
    log.on_start(fake_info(fake_recipe(tmp_path), tmp_path))
    log._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(RunError, match=r"cannot write .*metrics\.jsonl: No space left.*resume"):
        log.on_step(fake_step(2))
    log.on_end("failed", "the error above must stay the one that is seen")
