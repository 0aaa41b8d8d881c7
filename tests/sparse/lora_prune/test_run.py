"""A run that prunes while adapters train: resumed between updates, exported, and cut smaller."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.export.run import export_model
from leanmill.recipe.compress import CompressRecipe
from leanmill.trainer.passes.run import compress
from tests.sparse.tiny_runs import LAST, resumed, with_text


@pytest.mark.slow
def test_resumes_bitwise_and_is_cut_to_what_is_left(tmp_path):
    with_text(tmp_path)
    pruning = {"type": "lora_prune", "begin": 0.1, "end": 0.8, "update_every_steps": 2, "spared_last": 0}
    state, told = resumed(tmp_path, "run", {"type": "lora", "rank": 2}, pruning)
    kept = [value for key, value in state["model"].items() if key.endswith(".kept")]
    assert len(kept) == 7
    assert sorted(int(value.sum()) for value in kept) == [1, 1, 1, 1, 16, 16, 16]
    assert told[8][1]["lora_prune/masked_neurons"] == 0.5
    export_model(tmp_path / "run" / LAST, tmp_path / "zeros")
    asked = {"model": {"path": str(tmp_path / "zeros")}, "device": "cpu", "passes": [{"type": "remove_zeros"}]}
    compress(CompressRecipe.model_validate(asked), tmp_path / "small")
    # The one layer there is stays a Llama's.
    zeros, small = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("zeros", "small"))
    assert (small.config.model_type, small.config.intermediate_size) == ("llama", 16)
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(small(input_ids=ids).logits, zeros(input_ids=ids).logits)
