"""Two ranks, each with half of the rows, cut what one process cuts."""

import pytest
import torch

from leanmill.trainer.passes.run import compress
from tests.distributed import run_ranks
from tests.sparse.minitron.test_minitron import load, rows_of, save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


PASSES = {
    "slicegpt": {"hidden_size": 24},
    "cfsp": {"sparsity": 0.5, "multiple_of": 1},
    "adapt_pruner": {"sparsity": 0.3, "amplitude": 0.2, "multiple_of": 1},
    "flap": {"sparsity": 0.4},
    # Measured latencies differ, these do not.
    "ziplm": {"speedup": 1.5, "multiple_of": 28, "latency_table": "TABLE"},
    "remove_zeros": {},
    "puzzle": {"parameters": 0.7, "epochs": 0},
    # A step takes a batch of every rank, so only maps that stay as they were drawn are the same.
    "lolcats": {"sliding_window": 4, "feature_dim": 4, "epochs": 1, "lr": 1e-9},
    "mha2mla": {"kv_lora_rank": 14, "rope_head_dim": 4},
    "transmla": {"kv_lora_rank": 14, "qk_rope_head_dim": 4, "frequency_fold": 4},
}
TABLE = '{"groups": {"1": 20, "2": 30, "3": 40}, "neurons": {"28": 50, "56": 80}}'


def _compress(config, out):
    compress(config, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_two_ranks_cut_what_one_process_cuts(name, text, tokenizer, tmp_path):  # noqa: F811
    save(tmp_path / "in", tokenizer, dtype=torch.float32, num_hidden_layers=2)
    (tmp_path / "table.json").write_text(TABLE)
    options = {key: str(tmp_path / "table.json") if value == "TABLE" else value for key, value in PASSES[name].items()}
    config = recipe(tmp_path / "in", text, tmp_path, {"type": name, **options})
    compress(config, tmp_path / "one")
    run_ranks(_compress, 2, config, tmp_path / "two")
    rows = rows_of(config, tokenizer)
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    # Components have no sign, so the function is compared.
    with torch.no_grad():
        torch.testing.assert_close(
            one(**rows, use_cache=False).logits, two(**rows, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (one, two)]
    assert shapes[0] == shapes[1]
