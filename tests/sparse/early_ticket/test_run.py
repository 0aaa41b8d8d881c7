"""A run that draws a ticket: resumed between comparisons, and exported."""

import pytest
import torch
from safetensors.torch import load_file

from leanmill.export.run import export_model
from tests.sparse.tiny_runs import LAST, resumed, with_text


@pytest.mark.slow
def test_resumes_bitwise_and_exports_its_zeros(tmp_path):
    with_text(tmp_path)
    technique = {
        "type": "early_ticket",
        "pattern": "column",
        "compare_every_steps": 1,
        "num_masks": 4,
        "tolerance": 0.9,
        "latest": 0.8,
    }
    state, told = resumed(tmp_path, "ticket", technique)
    assert told[8][1]["early_ticket/drawn_after_steps"] == 4
    histories = [value for key, value in state["model"].items() if key.endswith("history")]
    assert len(histories) == 7
    assert all(history.dtype == torch.uint8 for history in histories)
    export_model(tmp_path / "ticket" / LAST, tmp_path / "plain")
    weights = load_file(tmp_path / "plain/model.safetensors")
    pruned = [value for key, value in weights.items() if key.endswith("_proj.weight")]
    assert not any("history" in key for key in weights)
    assert all((value == 0).all(0).float().mean() == 0.5 for value in pruned)
