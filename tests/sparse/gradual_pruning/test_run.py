"""A run that prunes ever more: resumed between updates, and exported."""

import pytest
from safetensors.torch import load_file

from leanmill.export.run import export_model
from tests.sparse.tiny_runs import LAST, resumed, with_text


GRADUAL = {"type": "gradual_pruning", "sparsity": 0.5, "end": 0.8, "update_every_steps": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_text(tmp_path_factory.mktemp("gradual"))


@pytest.mark.parametrize(
    "changes",
    [
        {"scope": "global"},
        pytest.param({"pattern": "row", "criterion": "fisher"}, marks=pytest.mark.slow),
        pytest.param({"criterion": "mfac", "mfac_gradients": 3}, marks=pytest.mark.slow),
    ],
)
def test_resumes_bitwise_and_exports_its_zeros(folder, changes):
    technique, name = GRADUAL | changes, changes.get("pattern") or changes.get("criterion", "weights")
    expected, told = resumed(folder, name, technique)
    found = [told[step][1]["gradual_pruning/sparsity"] for step in range(1, 9)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(0.5, abs=0.02)
    export_model(folder / name / LAST, folder / f"{name}-plain")
    weights = load_file(folder / f"{name}-plain/model.safetensors")
    masks = {
        key.replace("stages.mask.mask", "weight"): mask for key, mask in expected["model"].items() if "mask" in key
    }
    assert len(masks) == 7
    assert all((weights[key][~mask] == 0).all() for key, mask in masks.items())
