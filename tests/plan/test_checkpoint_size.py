"""The predicted size of a checkpoint against one that a run wrote."""

import pytest
import yaml

from leanmill.cli.main import main
from leanmill.plan.plan import plan
from leanmill.recipe.io import load_recipe
from tests.core.tiny import tiny


LORA = {"type": "lora", "rank": 16, "alpha": 16}
# Its factors are frozen, and saved all the same.
XS = {"type": "peft", "method": "core_lora", "variant": "lora_xs", "r": 16}


@pytest.mark.parametrize("adapters", [[], [LORA], [XS]], ids=["whole", "lora", "lora_xs"])
def test_is_that_of_a_run(adapters, tmp_path):
    tiny("llama", vocab_size=300).save_pretrained(tmp_path / "base")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 300}
    recipe = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"path": str(tmp_path / "base")} if adapters else {"config": config},
        "data": {
            "sequence_length": 32,
            "cache_dir": str(tmp_path / "cache"),
            "tokenizer": {"vocab_size": 300, "num_training_bytes": 20_000},
            "source": {"type": "local_corpus", "max_bytes": 40_000, "domains": {"python": 1.0}},
        },
        "techniques": adapters,
        "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 64},
        "train": {"steps": 1, "precision": "fp32"},
        "eval": {"tokens_per_domain": 32},
        "log": {"tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints").rglob("*.safetensors"))
    predicted = plan(load_recipe(str(tmp_path / "recipe.yaml"), [])).checkpoint_bytes
    assert predicted == pytest.approx(written, rel=0.15)  # the rest is names and counters, much beside this little
    assert predicted < written
