from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from leanmill.report.loggers.progress import WIDTH, Progress, step_line, step_lines
from tests.trainer.fake_run import fake_eval, fake_info, fake_recipe, fake_step, play, with_experts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _told(run_dir: Path, stream: io.StringIO, **changes) -> str:
    recipe = fake_recipe(run_dir, name=changes.pop("name", "fake"))
    play([Progress(run_dir, stream)], fake_info(recipe, run_dir, **changes), until=50)
    return unstamped(stream.getvalue()) if not stream.isatty() else stream.getvalue()


def unstamped(text: str) -> str:
    """Lines of a file without the time that each begins with, or the space below it that continuations have."""
    stamped = re.compile(r"(?:\d{4}-\d\d-\d\d \d\d:\d\d:\d\d | {20})(.*\n)")
    return "".join(stamped.fullmatch(line)[1] for line in text.splitlines(True))


def test_plain_lines_are_narrow_and_free_of_control_codes(tmp_path: Path) -> None:
    text = _told(tmp_path, io.StringIO(), notes=("a note that is longer than one line of a terminal " * 4,))
    assert all(len(line) <= WIDTH for line in text.splitlines())
    assert "\x1b" not in text
    assert "step  50/400" in text
    assert "eta" in text
    assert "tok/s" in text
    assert "mfu" in text


def test_only_the_first_line_of_a_text_has_its_time(tmp_path: Path) -> None:
    stream = io.StringIO()
    note = " ".join(f"word{number}" for number in range(60))
    Progress(tmp_path, stream).on_start(fake_info(fake_recipe(tmp_path), tmp_path, notes=(note,)))
    assert note in " ".join(stream.getvalue().split())


def test_banner_shows_every_note(tmp_path: Path) -> None:
    text = _told(
        tmp_path, io.StringIO(), notes=("engine fsdp because two devices", "converted 12 of 14"), start_step=40
    )
    assert "engine fsdp because two devices\nconverted 12 of 14\n" in text
    assert "from step 40" in text
    assert "5.24M parameters" in text


def test_report_path_is_the_last_line(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("report")
    assert _told(tmp_path, io.StringIO()).splitlines()[-1] == f"report: {tmp_path.resolve() / 'report.html'}"


def test_no_report_no_path(tmp_path: Path) -> None:
    assert "report" not in _told(tmp_path, io.StringIO())


def test_eta_counts_the_remaining_steps() -> None:
    line = step_line(fake_step(100, step_seconds=2.0), 400, None)
    assert line.endswith("eta 10m00s")
    assert "mfu" not in line


@pytest.mark.parametrize("step", [1, 999_999])
def test_the_longest_line_still_fits(step: int) -> None:
    record = fake_step(
        step,
        losses={"total": 1234.5678},
        grad_norm=1.2e-5,
        tokens_per_second=123456789.0,
        step_seconds=999.0,
        skipped=1234,
    )
    assert len(step_line(record, 1_000_000, 0.4567)) <= WIDTH


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    text = _told(tmp_path, Terminal(), name="run [bold]one")
    assert "\x1b[" in text
    assert "50/400" in text
    assert "run [bold]one" in text
    assert f"bits/byte {fake_eval(50).domains['cpp'].bits_per_byte:.3f}" in text
    assert f"cross_entropy {fake_step(50).losses['cross_entropy']:.3f}" in text
    assert not re.search(r"^\d{4}-", text, re.MULTILINE)


def test_each_term_of_the_loss_has_its_number() -> None:
    losses = {"total": 3.5, "cross_entropy": 2.25, "router_balance/model.layers.0": 9.0, "router_balance": 0.0125}
    first, second = step_lines(fake_step(10, losses=losses), 400, None)
    assert "loss 3.500" in first
    assert second == "  cross_entropy 2.250  router_balance 0.013"
    assert len(step_lines(fake_step(10, losses={"total": 3.5, "cross_entropy": 3.5}), 400, None)) == 1
    many = {"total": 1.0, **{f"a_long_name_{i}": 1.0 for i in range(9)}}
    lines = step_lines(fake_step(10, losses=many), 400, None)
    assert all(len(line) <= WIDTH for line in lines)
    assert " ".join(" ".join(lines[1:]).split()) == " ".join(f"a_long_name_{i} 1.000" for i in range(9))


def test_passes_over_the_data_are_said_and_counted(tmp_path: Path) -> None:
    text = _told(tmp_path, io.StringIO(), epochs=2.5)
    assert "tokens, 2.5 passes over the data, " in " ".join(text.split())
    assert "epoch 0.31  loss" in step_line(fake_step(50, epoch=0.3125), 400, None)
    assert "epoch" not in step_line(fake_step(50), 400, None)
    assert "passes" not in _told(tmp_path, io.StringIO())


def test_messages_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "swordfish-swordfish")
    stream = io.StringIO()
    observer = Progress(tmp_path, stream)
    observer.on_start(fake_info(fake_recipe(tmp_path), tmp_path, notes=("key swordfish-swordfish",)))
    observer.on_end("failed", "HTTPError: swordfish-swordfish refused")
    assert "swordfish" not in stream.getvalue()
    assert "refused" in stream.getvalue()


def test_an_evaluation_says_what_probes_found_and_could_not(tmp_path: Path) -> None:
    stream = io.StringIO()
    record = replace(with_experts(fake_eval(50)), notes=("no held-out token of 'cpp' got to an expert",))
    Progress(tmp_path, stream).on_eval(record)
    lines = unstamped(stream.getvalue()).splitlines()
    assert f"  experts/specialisation {0.3 * 50 / 400:.3f}" in lines
    assert not any("specialisation/1" in line for line in lines)
    assert lines[-1] == "  no held-out token of 'cpp' got to an expert"
