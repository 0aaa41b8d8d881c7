"""Windows that slide over blocks: what is trained against what, and what is written."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.core.errors import RunError
from leanmill.data.build import build_train_data
from leanmill.trainer.passes.run import compress
from leanmill.trainer.passes.window_pass import windows
from tests.distributed import run_ranks
from tests.trainer.passes.test_run import recipe, save_model, text, tokenizer  # noqa: F401  (fixtures)


CBQ = {"type": "cbq", "weight_bits": 2, "group_size": 16, "epochs": 2}


def test_windows_overlap_and_end_with_the_blocks():
    assert list(windows(5, 2, 1)) == [(0, 2, 1), (1, 3, 2), (2, 4, 3), (3, 5, 5)]
    assert list(windows(5, 3, 0)) == [(0, 3, 3), (3, 5, 5)]
    assert list(windows(2, 4, 1)) == [(0, 2, 2)]


def hidden_error(dense, folder, ids):
    other = AutoModelForCausalLM.from_pretrained(folder).float()
    with torch.no_grad():
        want, got = (m.model(input_ids=ids, use_cache=False).last_hidden_state for m in (dense, other))
    return float((got - want).norm() / want.norm())


def test_blocks_compute_what_they_did(text, tokenizer, tmp_path):  # noqa: F811
    dense = save_model(tmp_path / "in", initializer_range=0.1, num_hidden_layers=2)
    tokenizer.save_pretrained(tmp_path / "in")
    config = recipe(
        tmp_path / "in",
        text,
        tmp_path,
        {**CBQ, "epochs": 15, "window_blocks": 1, "overlap_blocks": 0, "exclude": ["k_proj"]},
    )
    reports = compress(config, tmp_path / "out")
    assert len(reports) == 12
    rtn = {"type": "rtn", "weight_bits": 2, "group_size": 16, "scale": "mse", "exclude": ["k_proj"]}
    compress(recipe(tmp_path / "in", text, tmp_path, rtn), tmp_path / "rtn")
    ids = build_train_data(config.data, tokenizer, seed=0).next_rows(8)["input_ids"]
    assert hidden_error(dense, tmp_path / "out", ids) < 0.9 * hidden_error(dense, tmp_path / "rtn", ids)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, p), q in zip(dense.named_parameters(), after.parameters(), strict=True):
        if "_proj" in name and "k_proj" not in name:
            assert all(len(group.unique()) <= 3 for group in q.reshape(-1, 16)), name
        else:
            assert torch.equal(p, q), name


def _compress(config, out):
    compress(config, out)


def test_two_ranks_train_what_one_process_trains_on_larger_batches(text, tokenizer, tmp_path):  # noqa: F811
    save_model(tmp_path / "in", num_hidden_layers=2)
    tokenizer.save_pretrained(tmp_path / "in")
    pass_config = {**CBQ, "rounding": "soft"}
    for name, rows in (("one", 8), ("two", 4)):
        config = recipe(
            tmp_path / "in", text, tmp_path, pass_config, calibration={"num_rows": 8, "rows_per_batch": rows}
        )
        if name == "one":
            compress(config, tmp_path / name)
        else:
            run_ranks(_compress, 2, config, tmp_path / name)
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        # A rounding that is half up may fall to either side.
        assert torch.isclose(p, q, rtol=1e-3, atol=1e-4).float().mean() > 0.99, name


def test_a_loss_that_is_no_number_is_an_error_and_nothing_is_written(text, tokenizer, tmp_path):  # noqa: F811
    save_model(tmp_path / "in", num_hidden_layers=1)
    tokenizer.save_pretrained(tmp_path / "in")
    with pytest.raises(RunError, match="loss of a window is not finite"):
        compress(recipe(tmp_path / "in", text, tmp_path, {**CBQ, "step_lr": 1e6}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
