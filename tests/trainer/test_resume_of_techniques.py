"""What techniques draw, schedule and calibrate goes on after a resume as if nothing had happened, bitwise."""

import json
import shutil
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.checkpoint.reading import read_document, read_full_state
from leanmill.checkpoint.remote import RemoteFolder
from leanmill.core.errors import ConfigError
from leanmill.export import export_model
from leanmill.recipe.root import Recipe
from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint
from leanmill.trainer.run import run
from tests.data.samples import write_texts


TECHNIQUES = {
    "mask_llm": [{"type": "mask_llm"}],
    "lsq": [{"type": "lsq", "activation_bits": 8, "granularity": "row"}],
    "rho1": [{"type": "rho1", "reference": "MODEL", "warmup_share": 0.25}],
    "own text": [
        {"type": "on_policy", "share": 0.6, "prompt_tokens": 4},
        {"type": "distill", "teacher": "MODEL"},
        {"type": "nm_sparsity"},
    ],
    "layers": [
        {"type": "stochastic_depth", "rate": 0.5, "early_exit": {"scale": 1.0, "rotation": 2}},
        {"type": "layernorm_scaling", "start": "as_loaded"},
        {"type": "neftune"},
    ],
    "routers": [{"type": "mixture_of_depths", "layers": [1]}, {"type": "router_tuning", "num_layers": 2}],
    # Half-way in full precision, the rest of the schedule after the resume.
    "bitnet": [{"type": "ternary", "activation_bits": 8, "warmup_steps": 3}],
    "lsq_plus": [{"type": "lsq", "activation_bits": 4, "activation_offset": True, "warmup_steps": 3}],
    # Ranks are given in every step but the first.
    "earned ranks": [
        {"type": "peft", "method": "rank_lora", "r": 4, "target_r": 1.5, "grow_every": 1, "grow_after": 1}
    ],
    "routed adapters": [
        {"type": "peft", "method": "moe_lora", "r": 1, "num_experts": 4, "balance": "bias", "bias_rate": 0.01}
    ],
    # Over a base in codes.
    "lora": [{"type": "lora", "rank": 2}],
    "both": [{"type": "mask_llm"}, {"type": "lsq", "activation_bits": 8}],
}
SLOW = {"routed adapters"}
"""Biases that move as those of a model's own routers do."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_texts(folder / "a.jsonl", 60)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=300, num_key_value_heads=1, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    return folder


SCHEDULE = {"type": "linear", "drop_at": 0.5, "weight_decay_until": 0.75}


def recipe(home, techniques, run_dir):
    model = str(home / "model")
    frozen_dtype = "nf4" if techniques[0]["type"] == "lora" else "auto"
    techniques = [{key: model if value == "MODEL" else value for key, value in raw.items()} for raw in techniques]
    return Recipe(
        run_dir=str(run_dir),
        device="cpu",
        model={"path": model, "frozen_dtype": frozen_dtype},
        data={
            "source": {"type": "hf", "path": str(home / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(home / "cache"),
        },
        techniques=techniques,
        schedule=SCHEDULE,
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={
            "steps": 4,
            "precision": "fp32",
            "deterministic": True,
            "cross_entropy_weight": 0.0 if techniques[0]["type"] == "on_policy" else 1.0,
        },
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 2},
        log={"every_steps": 1, "tensorboard": False, "report": False},
    )


def test_a_frozen_base_in_fp32_stays_so_where_the_recipe_leaves_it_open(home, tmp_path):
    def of(frozen_dtype, steps, name):
        given = recipe(home, [{"type": "lora", "rank": 2}], tmp_path / name).model_dump()
        given["model"]["frozen_dtype"] = frozen_dtype
        given["train"] |= {"precision": "bf16", "steps": steps}
        return Recipe.model_validate(given)

    run(of("fp32", 2, "run"))
    run(of("auto", 4, "run"))
    last = tmp_path / "run/checkpoints/step-00000004"
    assert read_document(last, "recipe.json")["model"]["frozen_dtype"] == "fp32"


def test_a_run_whose_folder_is_lost_goes_on_from_the_store(home, tmp_path):
    asked = recipe(home, TECHNIQUES["bitnet"], tmp_path / "a")
    remote = {"remote": f"file://{tmp_path}/store/{{name}}"}
    asked = asked.model_copy(update={"checkpoint": asked.checkpoint.model_copy(update=remote), "name": "lost"})
    run(asked)
    last = tmp_path / "a/checkpoints/step-00000004"
    expected = read_full_state(last)
    store = RemoteFolder(f"file://{tmp_path}/store/lost")
    assert [manifest.step for _, manifest in store.saves()] == [4, 2]
    store.delete_save("step-00000004-2")
    shutil.rmtree(tmp_path / "a")
    run(asked)
    steps = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if record["kind"] == "step"] == [3, 4]
    assert all(torch.equal(read_full_state(last)[key], value) for key, value in expected.items())
    assert [manifest.step for _, manifest in store.saves()] == [4, 2]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TECHNIQUES]
)
def test_resume_is_bitwise(name, home, tmp_path):
    whole = run(recipe(home, TECHNIQUES[name], tmp_path / "whole"))
    last = "checkpoints/step-00000004"
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / last)
    run(recipe(home, TECHNIQUES[name], tmp_path / "again"))
    for part in ("model", "optimizer"):
        expected, got = (read_full_state(tmp_path / run_dir / last, part) for run_dir in ("whole", "again"))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[key], value) for key, value in expected.items()), part
    scores = evaluate_checkpoint(tmp_path / "whole" / last).scores
    assert scores["all"].loss == pytest.approx(whole.scores["all"].loss, rel=1e-6)
    if name == "routers":
        assert all(".around." in key for key in read_full_state(tmp_path / "whole" / last, "model"))
        with pytest.raises(ConfigError, match="no plain transformers model"):
            export_model(tmp_path / "whole" / last, tmp_path / "out")
        return
    to: dict[str, Any] = {"to": "adapter"} if name == "routed adapters" else {"activations": "float"}
    report = export_model(tmp_path / "whole" / last, tmp_path / "out", **to)
    assert report.path.is_dir()
    if name in ("mask_llm", "both"):
        assert all(
            ".stages." in key or ".inputs." in key for key in read_full_state(tmp_path / "whole" / last, "model")
        )
