"""Levels made, judged and written: what searches over them do to a model."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.levels import Drop
from leanmill.core.registry import parse_pass
from leanmill.parallel.launch import Ranks
from leanmill.trainer.passes.levels import Unit, whole_file
from leanmill.trainer.passes.run import calibration_rows, compress
from leanmill.trainer.passes.search import space_of
from tests.distributed import run_ranks
from tests.trainer.passes.test_run import recipe, save_model, text, tokenizer  # noqa: F401


SPARSITIES = [{"type": "sparsegpt", "sparsity": s, "block_size": 16} for s in (0.25, 0.5, 0.75)]
QUICK = {
    "generations": 2,
    "offspring": 4,
    "selection": [{"survivors": 2, "tokens": 32}, {"survivors": 1, "tokens": 128}],
}
EVOPRESS = {"type": "evopress", "levels": SPARSITIES, "sparsity": 0.5, "start_tokens": 32, **QUICK}


@pytest.fixture
def given(text, tokenizer, tmp_path):  # noqa: F811
    model = save_model(tmp_path / "in", num_hidden_layers=2)
    tokenizer.save_pretrained(tmp_path / "in")
    return model, lambda *passes: recipe(tmp_path / "in", text, tmp_path, *passes)


def found_levels(folder):
    return json.loads((folder / "levels.json").read_text())


def test_each_layer_is_what_its_level_makes_of_it_and_the_budget_is_met(given, tmp_path):
    model, recipe_of = given
    reports = compress(recipe_of(EVOPRESS), tmp_path / "out")
    levels = found_levels(tmp_path / "out")
    assert levels["bits"] == levels["budget_bits"]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for number, level in enumerate(SPARSITIES):
        # The first block's inputs do not depend on levels.
        compress(recipe_of(level), tmp_path / f"uniform-{number}")
        uniform = AutoModelForCausalLM.from_pretrained(tmp_path / f"uniform-{number}")
        for name, chosen in levels["units"].items():
            if chosen == 2 - number and name.startswith("model.layers.0."):
                torch.testing.assert_close(after.get_submodule(name).weight, uniform.get_submodule(name).weight)
    for name, chosen in levels["units"].items():
        zeros = (after.get_submodule(name).weight == 0).float().mean().item()
        assert zeros == pytest.approx((0.75, 0.5, 0.25)[chosen], abs=0.02), name
    assert torch.equal(after.lm_head.weight, model.lm_head.weight)
    assert "8.000 bits a weight on average" in str(reports[-1])
    summary = json.loads((tmp_path / "out" / "leanmill.json").read_text())
    assert sorted(levels["units"]) == summary["layers"]


def test_the_loss_is_the_divergence_of_what_is_written(given, tmp_path):
    """Of all calibration rows, since the last stage takes them all."""
    model, recipe_of = given
    compress(recipe_of(EVOPRESS), tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    total = count = 0
    one_rank = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    for batch in calibration_rows(recipe_of(EVOPRESS), tmp_path / "in", one_rank):
        with torch.no_grad():
            dense, ours = (one(**batch, use_cache=False).logits.log_softmax(-1) for one in (model, after))
        total += F.kl_div(ours, dense, reduction="sum", log_target=True).item()
        count += batch["input_ids"].numel()
    assert found_levels(tmp_path / "out")["divergence"] == pytest.approx(total / count, rel=1e-4)


def _search(config, out):
    compress(config, out)
    return True


def test_two_ranks_choose_together(given, tmp_path):
    _, recipe_of = given
    run_ranks(_search, 2, recipe_of(EVOPRESS), tmp_path / "out")
    levels = found_levels(tmp_path / "out")
    assert levels["bits"] == levels["budget_bits"]
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, chosen in levels["units"].items():
        zeros = (after.get_submodule(name).weight == 0).float().mean().item()
        assert zeros == pytest.approx((0.75, 0.5, 0.25)[chosen], abs=0.02), name


def test_levels_are_solved_once_and_searches_go_on(given, tmp_path, monkeypatch):
    _, recipe_of = given
    work = {"work_dir": str(tmp_path / "work")}
    compress(recipe_of(EVOPRESS | work), tmp_path / "one")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.safetensors")}
    assert len(files) == 2 * 3

    def no_solver(self):
        raise AssertionError

    monkeypatch.setattr("leanmill.sparse.sparsegpt.config.SparseGpt.solver", lambda self: Drop().solver())
    monkeypatch.setattr("leanmill.trainer.passes.levels.LevelStore._solve", no_solver)
    asked = []
    losses = "leanmill.trainer.passes.judge.ModelJudge.losses"
    monkeypatch.setattr(losses, lambda self, candidates, **_: asked.append(candidates) or [0.0] * len(candidates))
    compress(recipe_of(EVOPRESS | work), tmp_path / "two")
    assert found_levels(tmp_path / "two")["units"] == found_levels(tmp_path / "one")["units"]
    assert len(asked) == 1  # of the end alone
    compress(recipe_of(EVOPRESS | work | {"sparsity": 0.6}), tmp_path / "three")
    assert {path: path.stat().st_mtime_ns for path in files} == files


def test_parts_that_are_dropped_leave_the_residual_stream(given, tmp_path):
    model, recipe_of = given
    config = {"type": "layer_budgets", "levels": ["drop", "dense"], "unit": "part", "sparsity": 0.3, "tokens": 128}
    reports = compress(recipe_of(config), tmp_path / "out")
    units = found_levels(tmp_path / "out")["units"]
    dropped = [name for name, level in units.items() if level == 0]
    assert dropped
    assert sorted(units) == [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("mlp", "self_attn")]
    for name in dropped:
        part = model.get_submodule(name)
        zeros = (lambda *args, **kwargs: (torch.zeros_like(kwargs["hidden_states"]), None)) if "attn" in name else None
        part.forward = zeros or torch.zeros_like
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, model(ids).logits)
    assert any("drop" in str(report) and "100.00%" in str(report) for report in reports)


def test_layer_errors_are_those_of_the_layers_outputs(given, tmp_path):
    _, recipe_of = given
    gptq = [{"type": "gptq", "weight_bits": bits, "group_size": 16} for bits in (2, 3, 4)]
    config = {"type": "layer_budgets", "levels": gptq, "average_bits": 3, "error": "layer", "exclude": ["down_proj"]}
    compress(recipe_of(config), tmp_path / "out")
    plain = compress(recipe_of(gptq[1] | {"exclude": ["down_proj"]}), tmp_path / "plain")
    (document,) = (tmp_path / "out.search").glob("levels-*/block-0000.json")
    errors = json.loads(document.read_text())
    for report in plain:
        if report.name in errors:
            assert errors[report.name][1] == pytest.approx(report.output_error, rel=1e-3)
            assert errors[report.name] == sorted(errors[report.name], reverse=True)
    assert not any("down_proj" in name for name in found_levels(tmp_path / "out")["units"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average_bits": 3}, "one budget"),
        ({"sparsity": None}, "one budget"),
        ({"levels": [*SPARSITIES, {"type": "wanda", "sparsity": 0.5}]}, "two of them take 8 bits"),
        ({"sparsity": 0.9}, "levels take 4 to 12"),
        ({"levels": ["drop", "dense"]}, "set unit: part"),
        ({"levels": ["dense", {"type": "upcycle", "num_experts": 2, "top_k": 1}]}, "no level of a layer"),
        ({"levels": ["dense", {"type": "gptq", "tokens": "attention"}]}, "gptq does not count all tokens alike"),
        ({"levels": ["dense", {"type": "wanda", "sparsity": 0.5, "targets": ["mlp.*"]}]}, "set them beside levels"),
        ({"levels": ["dense", "wandaa"]}, "did you mean wanda"),
        ({"levels": [{"type": "dense", "sparsity": 0.5}, "drop"], "unit": "part"}, "sparsity"),
        ({"levels": [{"type": "dense", "exclude": ["v_proj"]}, "drop"], "unit": "part"}, "set them beside levels"),
        ({"selection": [{"survivors": 2, "tokens": 10}]}, "one becomes the next parent"),
        ({"selection": [{"survivors": 1, "tokens": 10}, {"survivors": 1, "tokens": 5}]}, "more tokens than"),
    ],
)
def test_requests_that_make_no_search(changes, message, text, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        recipe("unused", text, tmp_path, EVOPRESS | changes)


def test_a_level_of_just_the_budget_meets_it():
    """Bits are whole, and what they are rounded by must not leave the smallest level over the budget."""
    levels = [{"type": "sparsegpt", "sparsity": share} for share in (0.35, 0.2)]
    config = parse_pass(EVOPRESS | {"levels": levels, "sparsity": 0.35})
    units = [Unit(f"layer{number}", (f"layer{number}",), 64 * 49) for number in range(9)]
    space = space_of(config, units)
    assert space.budget == space.cost([0] * 9)


def test_the_judge_computes_attention_as_the_recipe_says(given, tmp_path, monkeypatch):
    _, recipe_of = given
    seen = []

    def judge(model, *args, **kwargs):
        seen.append(model)
        raise RunError("seen")

    monkeypatch.setattr("leanmill.trainer.passes.search.ModelJudge", judge)
    config = recipe_of(EVOPRESS)
    config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "eager"})})
    with pytest.raises(RunError, match="seen"):
        compress(config, tmp_path / "out")
    (model,) = seen
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_two_searches_may_write_the_same_levels(tmp_path):
    """Neither sees half of a file, and what the other wrote meanwhile does no harm."""
    path = tmp_path / "block.json"
    with whole_file(path) as ours:
        ours.write_text("ours")
        path.with_suffix(".tmp").write_text("theirs")
        path.with_suffix(".tmp").replace(path)
        assert path.read_text() == "theirs"
    assert path.read_text() == "ours"

    def fail():
        with whole_file(path) as ours:
            ours.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["block.json"]
    assert path.read_text() == "ours"


def test_requests_that_do_not_fit_the_model(given, tmp_path):
    _, recipe_of = given
    few = EVOPRESS | {"selection": [{"survivors": 1, "tokens": 4096}]}
    with pytest.raises(ConfigError, match="calibration.num_rows=256"):
        compress(recipe_of(few), tmp_path / "out")
    parts = {"levels": ["drop", "dense"], "unit": "part", "exclude": ["v_proj"]}
    with pytest.raises(ConfigError, match="leave model.layers.0.self_attn.v_proj in it"):
        compress(recipe_of(EVOPRESS | parts), tmp_path / "out")
    with pytest.raises(ConfigError, match="group_size 64 does not divide"):
        compress(recipe_of(EVOPRESS | {"levels": ["dense", {"type": "gptq", "group_size": 64}]}), tmp_path / "out")
    assert not Path(tmp_path / "out").exists()
