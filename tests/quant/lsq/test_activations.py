"""Learned step sizes of activations: LSQ's equations, and a start that every rank count and resume shares."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.core.errors import RunError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import Sites, iter_sites
from leanmill.models.materialise import initialise_stages
from leanmill.parallel.launch import Ranks
from leanmill.quant.lsq.activations import LsqActivations
from leanmill.quant.lsq.calibration import CalibrateSteps
from tests.contract_cases import ENGINES
from tests.contract_models import NUM_ROWS
from tests.contract_training import FixedRows, recipe_of, train
from tests.core.tiny import install, loss_of, tiny, tokens
from tests.distributed import run_ranks


GRIDS = [(4, "signed", -8, 7), (2, "signed", -2, 1), (8, "signed", -128, 127), (3, "unsigned", 0, 7)]


def stage_of(num_features, num_bits=4, grid="signed", step=0.2):
    stage = LsqActivations(num_features, num_bits, grid)
    stage.initial.fill_(step)
    return stage


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 5), (1, 1)])
@pytest.mark.parametrize(("num_bits", "grid", "low", "high"), GRIDS)
def test_value_and_gradients_are_the_papers(num_bits, grid, low, high, shape, dtype):
    torch.manual_seed(0)
    x, upstream = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    stage = stage_of(shape[-1], num_bits, grid)
    with torch.no_grad():
        stage.moved.fill_(0.05)
    s = (stage.initial + stage.moved).detach().double()
    out = stage(x)
    out.backward(upstream)
    # Equations 1 to 5, with g = 1 / sqrt(N_F Q_P), N_F the features of the layer.
    v = x.detach().double() / s
    codes = v.clamp(low, high).round()
    inside = (v >= low) & (v <= high)
    to_step = torch.where(inside, codes - v, codes) * upstream.double() / (shape[-1] * high) ** 0.5
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), codes * s, rtol=max(eps, 1e-7), atol=0)
    assert torch.equal(x.grad, upstream * inside)
    torch.testing.assert_close(stage.moved.grad.double(), to_step.sum().reshape(1), rtol=1e-5, atol=1e-6)


def test_one_bit_has_a_level_on_either_side():
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 12, requires_grad=True), torch.randn(7, 12)
    stage = stage_of(12, 1, "midrise", step=0.8)
    out = stage(x)
    out.backward(upstream)
    v = x.detach() / 0.8
    assert torch.equal(out, 0.4 * v.sign())
    inside = v.abs() < 1  # a step around either level
    assert torch.equal(x.grad, upstream * inside)
    to_step = (torch.where(inside, v.sign() / 2 - v, v.sign() / 2) * upstream).sum() / 12**0.5
    torch.testing.assert_close(stage.moved.grad, to_step.reshape(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(stage(torch.zeros(2, 12)), torch.zeros(2, 12))


def test_without_a_start_all_is_nan():
    stage = LsqActivations(4, 4)
    assert stage(torch.ones(3, 4)).isnan().all()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_it_is_the_same(backend):
    model = nn.Sequential(nn.Linear(12, 5), nn.SiLU(), nn.Linear(5, 3))
    parse_technique({"type": "lsq", "activation_bits": 4}).install(Sites(model), None)
    for site in (model[0], model[2]):
        site.inputs["quant"].initial.fill_(0.3)
        with torch.no_grad():
            site.stages["quant"].scale.fill_(0.1)
    x = torch.randn(7, 12)
    compiled, gradients = torch.compile(model, fullgraph=True, backend=backend), []
    for function in (model, compiled):
        model.zero_grad()
        function(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=lambda m, n=name: f"{n}: {m}")


def starts(engine, num_steps, world_size=1, *names):
    """By name, the buffers `initial` after some steps."""
    rank = dist.get_rank() if world_size > 1 else 0
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    trained, loop = train(recipe_of(names or ("lsq_activations",), engine, "", world_size), ranks, num_steps=num_steps)
    state = {name: value.clone() for name, value in trained.model_state().items() if name.endswith("initial")}
    calibrated = [rule.state_dict() for rule in loop.step_rules if isinstance(rule, CalibrateSteps)]
    return state, calibrated


def test_steps_start_from_the_first_global_batch_unrounded():
    got, calibrated = starts({"type": "single"}, 1)
    assert calibrated == [{"is_calibrated": True}]
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    # The same weights on the same grids, and nothing on activations.
    staged, means = train(recipe_of(("lsq_activations",), {"type": "single"}, "", 1), ranks, num_steps=0)[0], {}
    for name, site in iter_sites(staged.module.model):
        del site.inputs["quant"]
        site.register_forward_pre_hook(lambda _, x, n=name: means.__setitem__(n, x[0].abs().mean()))
    staged.evaluate(FixedRows().next_rows(NUM_ROWS, rank=0, world_size=1))
    assert len(got) == len(means) == 4
    for name, mean in means.items():
        torch.testing.assert_close(got[f"{name}.inputs.quant.initial"], (2 * mean / 7**0.5).reshape(1))


@pytest.mark.parametrize("engine", ["fsdp", "zero1"])
def test_any_number_of_ranks_starts_alike_and_later_steps_leave_it(engine):
    expected, _ = starts({"type": "single"}, 1)
    for got, _ in run_ranks(starts, 2, ENGINES[engine], 3, 2):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_resumed_run_calibrates_no_more():
    model = tiny()
    rule = install(model, {"type": "lsq", "activation_bits": 8}).step_rules[0]
    rule.load_state_dict({"is_calibrated": True})

    def score(batch):
        raise AssertionError("one forward too many")

    context = StepContext(step=3, num_steps=9, num_micro_batches=1)
    assert rule.change_batches([{}], context, score) == [{}]
    assert {name for name in model.state_dict() if name.endswith("initial")} == {
        f"{name}.inputs.quant.initial" for name, _ in iter_sites(model)
    }


def test_activations_that_nothing_reaches_are_named():
    model = tiny()
    rule = install(model, {"type": "lsq", "activation_bits": 8, "targets": ["q_proj"]}).step_rules[0]
    context = StepContext(step=0, num_steps=9, num_micro_batches=1)
    with pytest.raises(RunError, match=r"reached model\.layers\.0\.self_attn\.q_proj.*lsq\.exclude"):
        rule.change_batches([], context, lambda batch: None)
    assert all(site.inputs["quant"].watch is None for _, site in iter_sites(model))


def test_experts_share_a_step_and_train_it():
    model, ids = tiny("mixtral"), tokens()
    rule = install(model, {"type": "lsq", "activation_bits": 8}).step_rules[0]
    initialise_stages(model)
    with torch.no_grad():
        rule.change_batches([{}], StepContext(step=0, num_steps=9, num_micro_batches=1), lambda _: loss_of(model, ids))
    loss_of(model, ids).backward()
    stages = {name: site.inputs["quant"] for name, site in iter_sites(model)}
    assert sum("experts" in name for name in stages) == 4
    for name, stage in stages.items():
        assert stage.initial > 0, name
        assert stage.moved.grad.abs() > 0, name


def test_an_embedding_has_no_activations():
    model = tiny(tie_word_embeddings=True)
    install(model, {"type": "lsq", "activation_bits": 8, "targets": ["embed_tokens", "lm_head"]})
    assert not model.get_input_embeddings().inputs
    assert isinstance(model.get_output_embeddings().inputs["quant"], LsqActivations)


def test_a_grid_without_bits_is_refused():
    for wrong, message in (
        ({"activation_grid": "unsigned"}, "set activation_bits too"),
        ({"activation_bits": 1}, "set activation_grid: midrise"),
        ({"activation_bits": 2, "activation_grid": "midrise", "activation_offset": True}, "remove one of the two"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_technique({"type": "lsq", **wrong})
