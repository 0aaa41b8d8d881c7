import json
from pathlib import Path

from leanmill.report.page.data import RunData, load_run
from leanmill.report.page.weights_view import weights_section


def _run(run_dir: Path, *zeros: float) -> RunData:
    history = [
        {"step": 50 * (index + 1), "sites": {"a": {"zero_fraction": share, "num_levels": 3}, "b": {"num_levels": 3}}}
        for index, share in enumerate(zeros)
    ]
    (run_dir / "sites.json").write_text(json.dumps({"history": history}))
    return load_run(run_dir)


def test_what_changes_is_drawn_by_site_and_step(tmp_path: Path):
    section = weights_section(_run(tmp_path, 0.1, 0.5, 0.9))
    assert section is not None
    (heat,) = section.heats
    assert heat.title == "Zeros"
    assert heat.rows == ["a", "b"]
    assert heat.columns == ["50", "100", "150"]
    assert heat.cells == [[0.1, 0.5, 0.9], [None, None, None]]
    assert 'data-heat="weights-zero_fraction"' in section.content


def test_what_never_changes_and_a_single_evaluation_are_not_drawn(tmp_path: Path):
    assert weights_section(_run(tmp_path, 0.5, 0.5)) is None
    assert weights_section(_run(tmp_path, 0.5)) is None
    assert weights_section(load_run(tmp_path / "nothing")) is None
