"""A run whose masks move: resumed in the middle of the schedule, logged, exported, and refused without its rule."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from leanmill.checkpoint.reading import read_document, read_full_state
from leanmill.core.errors import ConfigError
from leanmill.export.run import export_model
from leanmill.report.page.data import load_run
from leanmill.report.page.figures import groups
from leanmill.trainer.run import run
from tests.sparse.tiny_runs import recipe, steps_of, with_text


RIGL = {"type": "rigl", "density": 0.3, "update_every_steps": 2, "drop_fraction": 0.5, "update_until": 1.0}
LAST = "checkpoints/step-00000008"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_text(tmp_path_factory.mktemp("rigl"))


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_resumes_bitwise_between_updates_and_at_one(folder, method):
    whole = recipe(folder, f"{method}-whole", RIGL | {"method": method})
    run(whole)
    expected = {part: read_full_state(folder / f"{method}-whole" / LAST, part) for part in ("model", "optimizer")}
    told = {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / f"{method}-whole")}
    assert told[2][1] == {}
    assert told[3][1].keys() == {"rigl/density", "rigl/num_moved"}
    assert told[3][1] == told[4][1] != told[5][1]
    for step in (3, 4):
        name = f"{method}-{step}"
        shutil.copytree(folder / f"{method}-whole", folder / name)
        for later in range(step + 1, 9):
            shutil.rmtree(folder / name / f"checkpoints/step-{later:08d}")
        assert "rigl" in read_document(folder / name / f"checkpoints/step-{step:08d}", "train_state.json")["rules"]
        assert run(recipe(folder, name, RIGL | {"method": method})).step == 8
        for part, state in expected.items():
            got = read_full_state(folder / name / LAST, part)
            assert got.keys() == state.keys()
            assert all(torch.equal(got[key], value) for key, value in state.items()), (step, part)
        again = {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / name)}
        assert again == told
    charts = [chart for group in groups(load_run(folder / f"{method}-whole")) for chart in group.charts]
    assert {"rigl: density", "rigl: num moved"} <= {chart.title for chart in charts}


def test_the_export_has_zeros_where_the_mask_is_off(folder):
    run(recipe(folder, "exported", RIGL))
    export_model(folder / "exported" / LAST, folder / "plain")
    weights, trained = load_file(folder / "plain/model.safetensors"), read_full_state(folder / "exported" / LAST)
    masks = [name for name in trained if name.endswith("stages.mask.mask")]
    assert len(masks) == 7
    total = sum(trained[name].numel() for name in masks)
    assert sum(int(trained[name].sum()) for name in masks) == pytest.approx(0.3 * total, abs=4)
    for name in masks:
        weight = weights[name.replace("stages.mask.mask", "weight")]
        assert (weight[~trained[name]] == 0).all()
        assert (weight != 0).sum() > 0.8 * trained[name].sum()


def test_state_of_a_rule_that_is_gone_is_refused(folder):
    run(recipe(folder, "without", RIGL))
    with pytest.raises(ConfigError, match=r"state of the rule 'rigl', which this run has not; add the technique"):
        run(recipe(folder, "without", {"type": "ternary"}, accept_changes=["techniques"]))
