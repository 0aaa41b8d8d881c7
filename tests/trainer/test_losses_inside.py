"""A run whose losses arise inside the model: logged, resumed bitwise, evaluated and exported without its teacher."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.export import export_model
from leanmill.recipe.root import Recipe
from leanmill.trainer.evaluate_checkpoint import evaluate_checkpoint
from leanmill.trainer.run import run
from tests import contract_cases, contract_training
from tests.data.samples import write_jsonl
from tests.distributed import run_ranks
from tests.parallel.cases import ranks_here


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
PLACES = {
    "hidden_distill/0-1",
    "hidden_distill/1-3",
    *(f"router_{kind}/{n}" for kind in ("balance", "z") for n in (0, 1)),
}


def recipe(folder, name="run"):
    return Recipe(
        run_dir=str(folder / name),
        device="cpu",
        model={"config": {**EXPERTS, **SIZES}},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        techniques=[
            {"type": "router_balance", "weight": 0.1, "z_weight": 0.01},
            {"type": "hidden_distill", "teacher": str(folder / "teacher"), "weight": 0.5, "loss": "cosine"},
            {"type": "distill", "teacher": str(folder / "teacher"), "weight": 0.25},
        ],
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": 4, "precision": "fp32", "deterministic": True, "activation_checkpointing": "full"},
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 2},
        log={"every_steps": 1, "tensorboard": False},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inside")
    write_jsonl(folder / "a.jsonl", [{"text": f"text {n} and more of it" * 3} for n in range(60)])
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES | {"hidden_size": 24, "num_hidden_layers": 4})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "teacher")
    return folder


def records(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record for record in lines if record["kind"] == "step"}


def test_logged_resumed_evaluated_and_exported(folder):
    scores = run(recipe(folder)).scores
    told = records(folder / "run")
    for record in told.values():
        losses = record["losses"]
        assert (
            losses.keys()
            == {"cross_entropy", "total", "distill", "hidden_distill", "router_balance", "router_z"} | PLACES
        )
        assert losses["router_balance"] == pytest.approx((losses["router_balance/0"] + losses["router_balance/1"]) / 2)
        weights = {"cross_entropy": 1, "distill": 0.25, "hidden_distill": 0.5, "router_balance": 0.1, "router_z": 0.01}
        assert losses["total"] == pytest.approx(sum(w * losses[name] for name, w in weights.items()), rel=1e-5)
        assert 0 <= record["metrics"]["experts/max_violation"] <= 1
    last = folder / "run/checkpoints/step-00000004"
    shutil.rmtree(last)
    assert run(recipe(folder)).step == 4
    again = records(folder / "run")
    assert [again[step]["losses"] for step in (3, 4)] == [told[step]["losses"] for step in (3, 4)]

    shutil.move(folder / "teacher", folder / "gone")
    assert evaluate_checkpoint(last).scores["all"].loss == pytest.approx(scores["all"].loss, rel=1e-5)
    export_model(last, folder / "exported")
    exported = AutoModelForCausalLM.from_pretrained(folder / "exported")
    assert list(exported.state_dict()) == list(AutoModelForCausalLM.from_config(exported.config).state_dict())


COMBINATIONS = {
    "experts": ("mixtral", "router_balance"),
    "routed": ("mixtral", "router"),
    "hidden": ("hidden_distill", "distill", "nm_sparsity"),
}


def _trained(engine, teacher, ranks, activation_checkpointing="none", compile_blocks=False):
    """Parameters, and what the ledger holds, of every combination."""
    results = {}
    for key, names in COMBINATIONS.items():
        plain = contract_training.recipe_of(names, engine, teacher, ranks.world_size)
        changes = {"compile": compile_blocks, "activation_checkpointing": activation_checkpointing}
        changed = plain.model_copy(update={"train": plain.train.model_copy(update=changes)})
        torch._dynamo.reset()
        trained, _ = contract_training.train(changed, ranks)
        results[key] = contract_training.full_parameters(trained), trained.module.ledger.take()
        trained.close()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("engine_name", ["ddp", "fsdp", "zero2"])
def test_compiled_and_recomputed_on_two_ranks(engine_name, mode, tmp_path, monkeypatch):
    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled(module, backend="aot_eager"))
    teacher = contract_training.save_teacher(tmp_path / "teacher")
    wanted = _trained({"type": "single"}, teacher, ranks_here())
    engine = contract_cases.ENGINES[engine_name]
    got = run_ranks(lambda: _trained(engine, teacher, ranks_here(), mode, True), 2, timeout_seconds=280)
    for key, (parameters, sums) in wanted.items():
        for name, value in parameters.items():
            torch.testing.assert_close(
                got[0][key][0][name], value, rtol=1e-4, atol=2e-5, msg=lambda m, n=f"{key} {name}": f"{n}: {m}"
            )
        everywhere = got[0][key][1] + got[1][key][1]
        assert everywhere[:, 2].equal(2 * sums[:, 2]), "each micro-batch counts once, though it is recomputed"
        # Balance is a mean over micro-batches, of which two ranks have twice as many; distances are sums.
        share = 2 if key == "experts" else 1
        torch.testing.assert_close(everywhere[:, :2], share * sums[:, :2], rtol=1e-4, atol=1e-4)
