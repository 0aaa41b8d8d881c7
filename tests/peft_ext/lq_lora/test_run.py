"""From a model to its parts, to training on them and to an export."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.core.facets import LowRank
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.export import export_model
from leanmill.models.config import ModelConfig
from leanmill.models.stored_adapter import stored_adapter, write_adapter
from leanmill.recipe.root import Recipe
from leanmill.trainer.passes.run import compress
from leanmill.trainer.rebuild import rebuild
from leanmill.trainer.run import run
from tests.sparse.minitron.test_minitron import save
from tests.trainer.passes.test_run import recipe, text, tokenizer  # noqa: F401  (fixtures)


LQ = {"type": "lq_lora", "rank": 4, "bits": [2, 3, 4, 8], "average_bits": 4.0, "iterations": 4}


@pytest.fixture
def parts(text, tokenizer, tmp_path):  # noqa: F811
    model = save(tmp_path / "in", tokenizer, dtype=torch.bfloat16, num_hidden_layers=2)
    compress(recipe(tmp_path / "in", text, tmp_path, LQ), tmp_path / "parts")
    return model, tmp_path / "parts"


def training(folder, text, run_dir, steps=2, techniques=None, frozen_dtype="stored", **model):  # noqa: F811
    return Recipe(
        run_dir=str(run_dir),
        device="cpu",
        model={"path": str(folder), "frozen_dtype": frozen_dtype, **model},
        data={
            "source": {"type": "hf", "path": str(text), "validation_fraction": 0.1},
            "tokenizer": {"path": str(folder)},
            "sequence_length": 16,
            "cache_dir": str(run_dir.parent / "cache"),
        },
        techniques=[{"type": "lora", "rank": 4, "alpha": 8, "init": "stored"}] if techniques is None else techniques,
        optimizer={"type": "adamw", "lr": 1e-2},
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": steps, "precision": "fp32", "deterministic": True},
        eval={"tokens_per_domain": 32},
        checkpoint={"every_steps": 1},
        log={"every_steps": 1, "tensorboard": False, "report": False},
    )


def stored_adapter_of(folder):
    return stored_adapter(ModelConfig(path=str(folder)))


def check_parts(model, folder):
    """Layers get their bits, and miss little that the adapter has not."""
    kinds = json.loads((folder / "leanmill.json").read_text())["kept_as"]
    assert len(kinds) == 14
    assert len(set(kinds.values())) > 1
    bits = {"nf2": 2.25, "nf3": 3.25, "nf4": 4.5}
    shapes = {name: model.get_submodule(name).weight.shape for name in kinds}
    taken = sum(
        shape.numel() * (8 + 32 / shape[1] if kinds[name] == "int8" else bits[kinds[name]])
        for name, shape in shapes.items()
    )
    # A block at the end of a row is not full, and takes its scale all the same.
    assert taken <= 4.0 * sum(shape.numel() for shape in shapes.values())
    model.requires_grad_(False)
    base, adapter = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), stored_adapter_of(folder)
    base.requires_grad_(False)
    assert set(adapter) == set(kinds)
    for name, stored in adapter.items():
        weight = model.get_submodule(name).weight.float()
        kept, delta = base.get_submodule(name).weight, stored.read()
        with_delta = float((weight - kept - delta.b @ delta.a).norm())
        assert with_delta < 0.8 * float((weight - kept).norm()), name


def test_training_begins_where_the_pass_ended_and_goes_on_bitwise(parts, text, tmp_path):  # noqa: F811
    model, folder = parts
    check_parts(model, folder)
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    asked = training(folder, text, tmp_path / "run", steps=2)
    run(asked)
    first, last = (tmp_path / f"run/checkpoints/step-0000000{step}" for step in (1, 2))
    rebuilt = rebuild(last).model
    kinds = json.loads((folder / "leanmill.json").read_text())["kept_as"]
    for name, site in iter_sites(rebuilt):
        compact = site.stage(Slot.COMPACT)
        if name in kinds:
            assert compact.kind == kinds[name]
            assert torch.equal(compact(site.raw_weight).bfloat16(), stored[f"{name}.weight"])
    # Each step moves by about the learning rate.
    adapter = stored_adapter_of(folder)
    for name, site in iter_sites(rebuilt):
        if name in adapter:
            (delta,) = [stage.low_rank() for stage in site.weight_stages() if stage.slot is Slot.DELTA]
            begun, share = adapter[name].read(), 0.5**0.5
            assert float((delta.a - begun.a * share).abs().max()) < 0.03
            assert float((delta.b - begun.b * share).abs().max()) < 0.03
    expected = read_full_state(last)
    resumed = training(folder, text, tmp_path / "again", steps=2)
    run(resumed.model_copy(update={"checkpoint": resumed.checkpoint.model_copy(update={"resume": str(first)})}))
    found = read_full_state(tmp_path / "again/checkpoints/step-00000002")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    report = export_model(last, tmp_path / "out", to="adapter")
    assert report.max_difference <= report.tolerance
    assert (tmp_path / "out/base").is_dir()


def refused(match, make):
    with pytest.raises((ConfigError, ValueError), match=match):
        make()


def test_what_does_not_fit_says_what_to_type(text, tokenizer, tmp_path):  # noqa: F811
    model, folder = save(tmp_path / "in", tokenizer, dtype=torch.bfloat16, num_hidden_layers=2), tmp_path / "in"

    def compressed(**changes):
        return lambda: compress(recipe(folder, text, tmp_path, LQ | changes), tmp_path / "other")

    refused(r"rank=64 is above the shorter side of .*down_proj, 48 x 56; set rank: 48 or less", compressed(rank=64))
    refused(r"average_bits=2 is below 2\.\d+, what 2 bits", compressed(average_bits=2, weighted=False))
    refused(r"leaves a choice, and nothing says how many bits", compressed(average_bits=None))
    refused(r"average_bits is for a choice of bits", compressed(bits=[4]))
    passes = [LQ, {"type": "magnitude", "sparsity": 0.5}]
    refused(r"lq_lora leaves a part of each weight in an adapter", lambda: recipe(folder, text, tmp_path, *passes))

    def trained(techniques=None, **changes):
        return lambda: run(training(folder, text, tmp_path / "run", techniques=techniques, **changes))

    lora = {"type": "lora", "init": "stored"}
    refused(r"has none; set model.path to a folder that", trained([lora], frozen_dtype="auto"))
    refused(r"does not say how weights are kept", trained([{"type": "lora"}]))
    shapes = {name: m.weight.shape for name, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    factors = {
        f"model.{name}": LowRank(a=torch.zeros(4, shape[1]), b=torch.zeros(shape[0], 4), scaling=1.0)
        for name, shape in shapes.items()
    }
    write_adapter(folder / "adapter", factors)
    again = recipe(folder, text, tmp_path, passes[1])
    refused(r"has a part of its weights in adapter/, which passes", lambda: compress(again, tmp_path / "x"))
    refused(r"lora.rank=16, and the folder's adapter has rank 4; set rank: 4", trained([lora]))
    refused(r"holds a part of .*which lora.targets leave out", trained([lora | {"rank": 4, "targets": ["q_proj"]}]))
    refused(r"init=stored fills the factors inside of weights", trained([lora | {"where": "branch"}]))
