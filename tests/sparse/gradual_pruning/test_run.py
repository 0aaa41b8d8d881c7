"""A run that prunes ever more: resumed between updates, and exported."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from leanmill.checkpoint.reading import read_full_state
from leanmill.export.run import export_model
from leanmill.trainer.run import run
from tests.sparse.tiny_runs import recipe, steps_of, with_text


GRADUAL = {"type": "gradual_pruning", "sparsity": 0.5, "end": 0.8, "update_every_steps": 2}
LAST = "checkpoints/step-00000008"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_text(tmp_path_factory.mktemp("gradual"))


@pytest.mark.parametrize(
    "changes", [{"scope": "global"}, pytest.param({"pattern": "row", "criterion": "fisher"}, marks=pytest.mark.slow)]
)
def test_resumes_bitwise_and_exports_its_zeros(folder, changes):
    technique, name = GRADUAL | changes, changes.get("pattern", "weights")
    run(recipe(folder, name, technique))
    expected = {part: read_full_state(folder / name / LAST, part) for part in ("model", "optimizer")}
    told = {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / name)}
    found = [told[step][1]["gradual_pruning/sparsity"] for step in range(1, 9)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.5, abs=0.02)
    shutil.copytree(folder / name, folder / f"{name}-again")
    for later in range(5, 9):
        shutil.rmtree(folder / f"{name}-again/checkpoints/step-{later:08d}")
    assert run(recipe(folder, f"{name}-again", technique)).step == 8
    for part, state in expected.items():
        got = read_full_state(folder / f"{name}-again" / LAST, part)
        assert got.keys() == state.keys()
        assert all(torch.equal(got[key], value) for key, value in state.items()), part
    again = {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / f"{name}-again")}
    assert again == told
    export_model(folder / name / LAST, folder / f"{name}-plain")
    weights = load_file(folder / f"{name}-plain/model.safetensors")
    masks = {
        key.replace("stages.mask.mask", "weight"): mask for key, mask in expected["model"].items() if "mask" in key
    }
    assert len(masks) == 7
    assert all((weights[key][~mask] == 0).all() for key, mask in masks.items())
