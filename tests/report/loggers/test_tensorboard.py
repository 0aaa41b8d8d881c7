from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from leanmill.core.errors import ConfigError
from leanmill.report.loggers.sites import SiteStatistics
from leanmill.report.loggers.tensorboard import TensorBoardLog
from leanmill.report.observer import Sample
from tests.trainer.fake_run import fake_eval, fake_info, fake_recipe, fake_step, play, with_experts


def statistics(run_dir: Path, *names: str) -> SiteStatistics:
    found = SiteStatistics(run_dir)
    found.sites = [{"name": name, "histogram": [1, 3], "low": -2.0, "high": 2.0} for name in names]
    return found


def test_scalars_come_back_and_a_resume_replaces_what_it_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = fake_recipe(tmp_path)
    play([TensorBoardLog(tmp_path, statistics(tmp_path))], fake_info(recipe, tmp_path), until=70, status=None)
    log = TensorBoardLog(tmp_path, statistics(tmp_path, "layer.weight"))
    play([log], fake_info(recipe, tmp_path, start_step=50), until=100, status=None)
    log.on_eval(replace(with_experts(fake_eval(100)), samples=(Sample(prompt="once", text=" upon\n# a"),)))
    log.on_end("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss/cross_entropy")
    assert [event.step for event in losses] == list(range(2, 101, 2))
    assert losses[-1].value == pytest.approx(fake_step(100).losses["cross_entropy"])
    moved = events.Scalars("rules/rigl/num_moved")
    assert moved[-1].value == pytest.approx(fake_step(100).metrics["rigl/num_moved"])
    assert events.Scalars("eval_bits_per_byte/cpp")[0].value == pytest.approx(
        fake_eval(50).domains["cpp"].bits_per_byte
    )
    flops = events.Scalars("speed/model_tflops_per_second")[-1].value
    assert flops == pytest.approx(fake_step(100).tokens_per_second * fake_info(recipe, tmp_path).flops_per_token / 1e12)
    seen = events.Histograms("weights/layer.weight")[-1]
    assert (seen.step, seen.histogram_value.num) == (100, 4)
    assert seen.histogram_value.bucket == [1.0, 3.0]
    assert seen.histogram_value.bucket_limit == [0.0, 2.0]
    assert seen.histogram_value.sum == pytest.approx(-1.0 + 3.0)
    assert events.Scalars("eval_probes/experts/specialisation")[0].value == pytest.approx(0.3 * 100 / 400)
    (shown,) = events.Tensors("samples/0/text_summary")
    assert shown.step == 100
    assert shown.tensor_proto.string_val == [b"    once upon\n    # a\n"]


def test_a_missing_package_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        TensorBoardLog(tmp_path, statistics(tmp_path)).on_start(fake_info(fake_recipe(tmp_path), tmp_path))
