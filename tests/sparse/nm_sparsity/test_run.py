"""A run whose pruned weights are pulled beside Adam's moments: resumed, logged and exported."""

from safetensors.torch import load_file

from leanmill.export.run import export_model
from tests.sparse.tiny_runs import LAST, resumed, with_text


def test_resumes_bitwise_and_exports_its_masks(tmp_path):
    with_text(tmp_path)
    technique = {"type": "nm_sparsity", "decay": 0.1, "decay_on": "update", "decay_warmup": 0.5, "log_flips": True}
    state, told = resumed(tmp_path, "pulled", technique)
    pulls = [key for key in state["optimizer"] if "pull" in key]
    assert len(pulls) == 7
    assert all((state["optimizer"][key] == 0).float().mean() == 0.5 for key in pulls)
    assert all(0 < told[step][1]["nm_sparsity/flip_rate"] < 0.5 for step in range(1, 9))
    export_model(tmp_path / "pulled" / LAST, tmp_path / "plain")
    weights = load_file(tmp_path / "plain/model.safetensors")
    pruned = [value for key, value in weights.items() if key.endswith("_proj.weight")]
    assert len(pruned) == 7
    assert all((value.reshape(-1, 4).count_nonzero(-1) == 2).all() for value in pruned)
