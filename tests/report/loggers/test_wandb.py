from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from leanmill.core.errors import ConfigError
from leanmill.report.loggers import wandb as ours
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.loggers.wandb import WandbLog
from leanmill.report.observer import Sample
from tests.trainer.fake_run import fake_eval, fake_info, fake_recipe, play


def test_a_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="pip install wandb.*log.wandb=false"):
        WandbLog(tmp_path, SiteStatistics(tmp_path))


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.mark.usefixtures("no_key")
def test_without_a_key_the_run_stays_offline_and_holds_no_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "swordfish-swordfish")
    run_dir = tmp_path / "run"
    notes = ("pulled with swordfish-swordfish",)
    statistics = SiteStatistics(run_dir)
    statistics.sites = [{"name": "layer.weight", "histogram": [1, 3], "low": -2.0, "high": 2.0}]
    log = WandbLog(run_dir, statistics)
    play([log], fake_info(fake_recipe(run_dir), run_dir, notes=notes), until=50, status=None)
    log.on_eval(replace(fake_eval(50), samples=(Sample(prompt="once", text=" swordfish-swordfish"),)))
    log.on_end("finished")
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 1
    events = next(folders[0].glob("*.wandb")).read_bytes()
    assert b"eval_bits_per_byte/cpp" in events
    assert b"rules/rigl/num_moved" in events
    assert b"speed/model_tflops_per_second" in events
    assert b"weights/layer.weight" in events
    (table,) = (run_dir / "wandb").rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [[50, "once", " [redacted]"]]
    assert not any(b"swordfish" in path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    resumed = WandbLog(run_dir, statistics)
    resumed.on_start(fake_info(fake_recipe(run_dir), run_dir))
    resumed.on_end("finished")
    parts = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(parts) == 2, "the second start is a part of the same run"
    assert {part.name.rpartition("-")[2] for part in parts} == {resumed._run_id()}


@pytest.mark.usefixtures("no_key")
def test_a_resume_keeps_the_id(tmp_path: Path) -> None:
    ids = {WandbLog(tmp_path, SiteStatistics(tmp_path))._run_id() for _ in range(2)}
    assert [len(one) for one in ids] == [12]
