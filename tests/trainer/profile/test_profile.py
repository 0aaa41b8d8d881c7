"""Time and memory go to the modules that take them."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from leanmill.core.errors import ConfigError
from leanmill.recipe.root import Recipe
from leanmill.trainer.profile.communication import under_way
from leanmill.trainer.profile.hooks import ModuleHooks
from leanmill.trainer.profile.result import by_block, by_class
from leanmill.trainer.profile.run import profile
from leanmill.trainer.profile.timeline import Owner, Timeline
from tests.data.samples import write_texts
from tests.distributed import run_ranks


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, forward, backward):
        ctx.seconds = backward
        ctx.save_for_backward(value)
        time.sleep(forward)
        return value * 1.0

    @staticmethod
    def backward(ctx, gradient):
        _ = ctx.saved_tensors  # what recomputation brings back
        time.sleep(ctx.seconds)
        return gradient, None, None


class Leaf(nn.Module):
    def __init__(self, forward, backward):
        super().__init__()
        self.seconds = forward, backward

    def forward(self, value):
        return _Slow.apply(value, *self.seconds)


class Block(nn.Module):
    """Two leaves, and work of its own between them that no module does."""

    def __init__(self, *, recomputes=False):
        super().__init__()
        self.first, self.second, self.recomputes = Leaf(0.02, 0.05), Leaf(0.03, 0.07), recomputes

    def forward(self, value):
        return checkpoint(self._once, value, use_reentrant=False) if self.recomputes else self._once(value)

    def _once(self, value):
        return self.second(_Slow.apply(self.first(value), 0.04, 0.09))


def watched(module, *, steps=1):
    timeline = Timeline(torch.device("cpu"))
    timeline.is_running = True
    hooks = ModuleHooks(module, timeline)
    for _ in range(steps):
        timeline.begin(Owner("", "forward"))
        value = torch.ones(3, requires_grad=True) * 1.0
        module(value).sum().backward()
    timeline.begin(Owner("", "update"))
    hooks.remove()
    return timeline.totals()


def test_forward_and_backward_go_to_who_does_them():
    found = watched(nn.Sequential(Block()))
    expected = {
        Owner("0.first", "forward"): 0.02,
        Owner("0", "forward"): 0.04,
        Owner("0.second", "forward"): 0.03,
        Owner("0.first", "backward"): 0.05,
        Owner("0", "backward"): 0.09,
        Owner("0.second", "backward"): 0.07,
    }
    for owner, seconds in expected.items():
        # At least what it slept, and not what others did: a machine in use sleeps longer.
        assert seconds <= found[owner] < seconds + 0.02, owner


def test_what_runs_once_more_in_backward_is_told_apart():
    found = watched(nn.Sequential(Block(recomputes=True)))
    assert found[Owner("0.first", "recomputation")] >= 0.02
    assert found[Owner("0.second", "backward")] >= 0.07
    assert Owner("0.second", "recomputation") not in watched(nn.Sequential(Block()))


def test_classes_and_blocks_add_up_to_all_that_modules_took():
    model = nn.Sequential(Block(), Block())
    found = watched(model, steps=2)
    names = {name: type(module).__name__ for name, module in model.named_modules()}
    kept = {"0.first": 12, "1": 4, "": 2}
    classes = {part.name: part for part in by_class(found, kept, names, num_steps=2)}
    assert classes["Leaf"].count == 4
    assert classes["Leaf"].forward == pytest.approx(2 * 0.05, abs=0.03)
    assert classes["Leaf"].kept_bytes == 12
    blocks = by_block(found, kept, ["0", "1"], list(names), num_steps=2)
    assert [part.name for part in blocks] == ["0", "1", "outside"]
    assert sum(part.seconds for part in blocks) == pytest.approx(sum(part.seconds for part in classes.values()))
    assert [part.kept_bytes for part in blocks] == [12, 4, 2]


def test_kept_activations_are_counted_once_and_parameters_not():
    layer = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    hooks = ModuleHooks(layer, Timeline(torch.device("cpu")))
    value = torch.ones(5, 8)
    with hooks.counting():
        layer(value).sum().backward()
    # The input of each linear layer; tanh keeps its output, which is the second one's input.
    assert dict(hooks.kept) == {"0": 4 * 5 * 8, "1": 4 * 5 * 16}
    hooks.remove()


def test_collectives_that_overlap_count_once():
    cpu = torch.autograd.DeviceType.CPU

    def event(name, start, end):
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=cpu)

    events = [event("gloo:all_reduce", 0, 10), event("gloo:all_reduce", 5, 20), event("gloo:all_gather", 30, 35)]
    found = under_way([*events, event("aten::mm", 0, 100)], is_cuda=False)
    assert found == pytest.approx({"all_reduce": 20e-6, "all_gather": 5e-6, "any": 25e-6})


def _recipe(tmp_path, **changes):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    raw = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "model": {"config": {"model_type": "llama", "num_key_value_heads": 1, "vocab_size": 300, **sizes}},
        "data": {
            "source": {"type": "hf", "path": str(tmp_path / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(tmp_path / "cache"),
        },
        "batch": {"tokens_per_step": 128, "tokens_per_micro_batch": 32},
        "train": {"steps": 50, "precision": "fp32"},
        "eval": {"tokens_per_domain": 32},
        "cluster": {"hang_seconds": None},
    }
    return Recipe.model_validate(raw | changes)


@pytest.mark.parametrize(
    ("engine", "num_ranks"),
    [("single", 1), pytest.param("fsdp", 2, marks=pytest.mark.slow), pytest.param("ddp", 2, marks=pytest.mark.slow)],
)
def test_a_recipes_own_steps_are_profiled_and_nothing_is_left(tmp_path, engine, num_ranks):
    write_texts(tmp_path / "a.jsonl", 60)
    recipe = _recipe(tmp_path, engine=engine)

    def body():
        found = profile(recipe, num_steps=2, num_before=1)
        return None if found is None else found.to_json()

    first, *others = run_ranks(body, num_ranks)
    assert others == [None] * (num_ranks - 1)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run-profile").exists()
    json.dumps(first)
    assert first["step_seconds"] == pytest.approx(sum(first["phases"].values()))
    assert all(first["phases"][phase] > 0 for phase in ("data", "forward", "backward", "update"))
    modules = sum(part["seconds"] for part in first["blocks"])
    assert modules <= first["phases"]["forward"] + first["phases"]["backward"]
    assert {"Linear", "LlamaAttention", "LlamaMLP"} <= {part["name"] for part in first["classes"]}
    assert [part["name"] for part in first["blocks"]] == ["layers.0", "layers.1", "outside"]
    assert first["kept_bytes"] > 0
    assert (first["communication"].get("any", 0.0) > 0) == (num_ranks > 1)
    assert first["over_ranks"]["step"]["least"] <= first["over_ranks"]["step"]["most"]


def test_compiled_blocks_have_no_modules_to_look_into(tmp_path):
    with pytest.raises(ConfigError, match="train.compile=false"):
        profile(_recipe(tmp_path, train={"steps": 3, "compile": True}))


def test_stages_of_a_pipeline_are_not_alike(tmp_path):
    with pytest.raises(ConfigError, match="layout.pp=2 gives ranks different blocks"):
        profile(_recipe(tmp_path, engine="ddp", layout={"pp": 2}))
