from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.models.build import build_on_meta
from leanmill.models.counting import num_parameters
from leanmill.parallel.build import build_engine
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import prepare
from tests.contract_cases import ENGINES
from tests.contract_models import MODEL
from tests.contract_training import recipe_of, save_teacher
from tests.distributed import run_ranks


def _counts(engine):
    recipe = recipe_of((), engine, "", 2)
    rank = dist.get_rank()
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    model = build_on_meta(recipe.model)
    whole = num_parameters(model)[0]
    built, _ = build_engine(recipe.engine, ranks=ranks, precision="fp32", model_bytes=0)
    return whole, prepare(recipe, model, built, num_micro_batches=2).num_trainable


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_trainable_parameters_are_counted_whole_under_sharding(engine):
    for whole, num_trainable in run_ranks(_counts, 2, ENGINES[engine]):
        assert num_trainable == whole > 0


@pytest.mark.parametrize("where", ["weight", "branch"])
def test_a_technique_sets_rate_and_decay_of_the_parameters_it_brought(where):
    recipe = recipe_of(("lora", "lsq_row", "second_lora"), {"type": "single"}, "", 1).model_dump()
    first, lsq, second = recipe["techniques"]
    first |= {"where": where, "lr_factor": 4.0}
    lsq |= {"weight_decay": 0.05}
    second |= {"lr_factor": None, "weight_decay": None}
    model = build_on_meta(Recipe.model_validate(recipe).model)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    engine, _ = build_engine(Recipe.model_validate(recipe).engine, ranks=ranks, precision="fp32", model_bytes=0)
    prepare(Recipe.model_validate(recipe), model, engine, num_micro_batches=2)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {g["name"]: [names[id(p)] for p in g["params"]] for g in engine.param_groups}
    assert groups.keys() == {"decay", "decay, lr x 4", "weight_decay 0.05"}
    assert len(groups["decay, lr x 4"]) == 2 * 14
    assert len(groups["decay"]) == 2 * 4
    assert all("lora_" in name for name in groups["decay"] + groups["decay, lr x 4"])
    assert not set(groups["decay"]) & set(groups["decay, lr x 4"])
    assert all(name.endswith("stages.quant.scale") for name in groups["weight_decay 0.05"])
    assert len(groups["weight_decay 0.05"]) == 14


@pytest.mark.parametrize("key", ["lr_factor", "weight_decay"])
def test_a_technique_without_parameters_has_no_rate_of_its_own(key):
    with pytest.raises(ValueError, match=rf"ternary\.{key}: ternary brings no parameters.*optimizer\."):
        parse_technique({"type": "ternary", key: 0.5})


def test_a_decay_that_wipes_a_techniques_parameters_out_is_refused():
    recipe = recipe_of(("lora",), {"type": "single"}, "", 1).model_dump()
    recipe["techniques"][0]["lr_factor"] = 1e4
    with pytest.raises(
        ValueError, match=r"lora: optimizer\.lr=0\.01 x lr_factor=10000 x weight_decay=0\.1 is at least 1"
    ):
        Recipe.model_validate(recipe)


@pytest.fixture(scope="module")
def dense_and_pruned(tmp_path_factory):
    """Folders of a model and of a copy in which two of every four weights, not the smallest, are zero."""
    folders = [str(tmp_path_factory.mktemp(name)) for name in ("dense", "pruned")]
    raw = dict(MODEL)
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folders[0])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.mul_(torch.tensor([1.0, 0.0, 0.0, 3.0]).repeat(module.in_features // 4))
    model.save_pretrained(folders[1])
    return folders


def _learned_mask(engine, dense, pruned, world_size):
    mask = {"type": "mask_llm", "prior": "pruned", "prior_model": pruned, "prior_strength": 100.0}
    raw = recipe_of((), engine, "", world_size).model_dump()
    recipe = Recipe.model_validate(raw | {"model": {"path": dense}, "techniques": [mask]})
    model = build_on_meta(recipe.model)
    rank = dist.get_rank() if world_size > 1 else 0
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    built, _ = build_engine(recipe.engine, ranks=ranks, precision="fp32", model_bytes=0)
    prepare(recipe, model, built, num_micro_batches=2)
    name = "model.layers.1.mlp.down_proj.stages.mask.logits"
    return built.full_parameter(name)


@pytest.mark.parametrize("engine", ["single", "fsdp", "zero3"])
def test_a_learned_mask_starts_from_a_pruned_copy(engine, dense_and_pruned):
    if engine == "single":
        logits = _learned_mask({"type": "single"}, *dense_and_pruned, 1)
    else:
        logits = run_ranks(_learned_mask, 2, ENGINES[engine], *dense_and_pruned, 2)[1]
    assert logits.shape == (32, 12, 6)
    assert (logits.argmax(-1) == 2).all(), "the third way to keep two of four keeps the first and the last"


def test_a_copy_that_is_not_pruned_is_refused(dense_and_pruned):
    dense = dense_and_pruned[0]
    with pytest.raises(
        ConfigError, match=r"holds no zeros in .*_proj.weight, so it is no prior .* to mask_llm.exclude"
    ):
        _learned_mask({"type": "single"}, dense, dense, 1)


def test_a_pruned_copy_of_another_model_is_refused(dense_and_pruned, tmp_path):
    with pytest.raises(ConfigError, match=r"holds .*and the model has it \[.*this very model"):
        _learned_mask({"type": "single"}, dense_and_pruned[0], save_teacher(tmp_path), 1)
