"""P and V steps written out, what codes begin with, and which of them move."""

import math

import pytest
import torch
from pydantic import ValidationError

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.registry import parse_pass, parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.selection import largest_within
from leanmill.core.sites import Sites
from leanmill.core.stage import Slot
from leanmill.kernels.fake_quant.grid import make_grid
from leanmill.parallel.views import NativeViews
from leanmill.quant.pv_tuning.stage import PvStage


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def staged(weight, bits, levels, group_size=None):
    stage = PvStage(weight, bits, levels, group_size)
    stage.initialise(weight)
    return stage


def all_levels(stage, shape):
    """What each code of each weight would stand for, [..., out, in, codes]."""
    if stage.kind == "codebook":
        return stage.levels[..., None, :].expand(*shape, -1)
    grid = make_grid(stage.num_bits, stage.kind)
    scale = stage.levels.repeat_interleave(shape[-1] // stage.levels.shape[-1], -1)
    return scale[..., None] * (torch.arange(grid.low, grid.high + 1) + grid.shift)


CASES = [("symmetric", 3, 5), ("signed", 2, None), ("midrise", 1, 3), ("codebook", 2, None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("levels", "bits", "group_size"), CASES)
def test_values_and_gradients_with_codes_at_rest(levels, bits, group_size, dtype):
    weight = drawn(2, 7, 15).to(dtype).requires_grad_()
    stage = staged(weight.detach(), bits, levels, group_size)
    free = stage.levels.detach().clone().requires_grad_()
    stage.levels.data = free.detach()
    table = all_levels(stage, weight.shape).detach()
    want = table.gather(-1, stage.chosen.long()[..., None])[..., 0]
    got = stage(weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype))
    if levels != "codebook":  # begins with the nearest
        assert torch.equal((weight.float() - want).abs() <= (weight.float()[..., None] - table).abs().amin(-1) + 1e-6,
                           torch.ones_like(want, dtype=torch.bool))  # fmt: skip
    upstream = drawn(2, 7, 15, seed=1).to(dtype)
    got.backward(upstream)
    assert torch.equal(weight.grad, upstream)
    other = PvStage(weight, bits, levels, group_size)
    other.levels.data = free
    plain = all_levels(other, weight.shape).gather(-1, stage.chosen.long()[..., None])[..., 0]
    (theirs,) = torch.autograd.grad(plain, other.levels, upstream.float())
    torch.testing.assert_close(stage.levels.grad, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rtn", "squeezellm"])
def test_it_begins_with_what_a_pass_left(kind):
    weight = drawn(9, 24)
    if kind == "rtn":
        from leanmill.core.passes import InputStatistics

        statistics = InputStatistics(num_tokens=0, square_sum=torch.zeros(24), gram=None)
        solver = parse_pass({"type": "rtn", "weight_bits": 3, "group_size": 8, "scale": "mse"}).solver()
        written = solver.prepare(statistics)(weight.clone()).weight
        stage = staged(written, 3, "symmetric", 8)
    else:
        options = {"type": "squeezellm", "weight_bits": 2, "outlier_share": 0, "sensitive_share": 0}
        written = parse_pass(options).solver().solve(weight.clone(), torch.rand(9, 24)).weight
        stage = staged(written, 2, "codebook")
    torch.testing.assert_close(stage(written), written, rtol=1e-5, atol=1e-6)


def trained(**options):
    """A layer, its technique's rule, what a step is told of it, and plain SGD in the place of an optimizer."""
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(12, 9, bias=False)})
    with torch.no_grad():
        model.layer.weight.copy_(drawn(9, 12))
    installed = parse_technique({"type": "pv_tuning", **options}).install(Sites(model), None)
    (rule,) = installed.step_rules
    stage = model.layer.stage(Slot.QUANT)
    stage.reset_parameters()
    stage.initialise(model.layer.weight.detach())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def context(step, **more):
        views = NativeViews(model, optimizer)
        return StepContext(step=step, num_steps=10, num_micro_batches=1, views=views, **more)

    return model.layer, stage, rule, context


def v_step(target, before_codes, table, max_change, trust, forced):
    """One weight's V step in plain loops: target and table [n], [n, K]."""
    n = len(target)
    before = [table[i][before_codes[i]] for i in range(n)]
    order = sorted(range(n), key=lambda i: -abs(target[i] - before[i]))[: math.ceil(max_change * n)]
    codes, spent = list(before_codes), 0.0
    norm = math.sqrt(sum(x * x for x in before))
    for rank, i in enumerate(order):
        allowed = [
            k for k in range(len(table[i]))
            if not forced or (target[i] - before[i]) * (table[i][k] - before[i]) > 0
        ]  # fmt: skip
        new = min(allowed, key=lambda k: abs(target[i] - table[i][k]), default=before_codes[i])
        spent += (table[i][new] - before[i]) ** 2
        if rank and math.sqrt(spent) > trust * norm:
            break
        codes[i] = new
    return codes


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize(("levels", "bits", "group_size"), CASES)
def test_a_v_step_is_that_of_the_paper(levels, bits, group_size, accumulate):
    group_size = None if group_size is None else 4
    options = {"weight_bits": bits, "levels": levels, "group_size": group_size, "accumulate": accumulate}
    layer, stage, rule, context = trained(max_change=0.3, trust_ratio=0.5, **options)
    rule.before_optimizer(context(0))
    torch.testing.assert_close(layer.weight, layer.effective_weight())
    with torch.no_grad():
        layer.weight.add_(0.4 * drawn(9, 12, seed=3))  # the optimizer's step
        stage.levels.mul_(1.02)
    written, codes = layer.weight.detach().clone(), stage.chosen.detach().clone()
    share = 1.0 if accumulate else 0.8
    table = all_levels(stage, (9, 12)).detach().reshape(108, -1).double()
    want = v_step(
        written.flatten().double().tolist(), codes.flatten().tolist(), table.tolist(), 0.3 * share, 0.5 * share,
        not accumulate,
    )  # fmt: skip
    rule.after_optimizer(context(2, skipped=torch.tensor(False)))
    assert stage.chosen.flatten().tolist() == want
    num_moved = sum(a != b for a, b in zip(want, codes.flatten().tolist(), strict=True))
    assert num_moved
    assert rule.metrics()["moved"] == pytest.approx(num_moved / 108)
    assert torch.equal(layer.weight, written) is accumulate
    if not accumulate:
        torch.testing.assert_close(layer.weight, layer.effective_weight())


def test_nothing_moves_in_the_first_step_between_v_steps_or_where_gradients_are_not_finite():
    layer, stage, rule, context = trained(every_steps=3, max_change=1.0, trust_ratio=10.0)
    rule.before_optimizer(context(0))
    with torch.no_grad():
        layer.weight.add_(drawn(9, 12, seed=3))
    before = stage.chosen.detach().clone()
    for step, skipped in ((0, False), (2, False), (3, True)):
        rule.after_optimizer(context(step, skipped=torch.tensor(skipped)))
        assert torch.equal(stage.chosen, before)
    rule.after_optimizer(context(3, skipped=torch.tensor(False)))
    assert not torch.equal(stage.chosen, before)


def test_costs_add_up_to_the_budget():
    score, cost = drawn(500).abs(), drawn(500, seed=1).abs()
    among = drawn(500, seed=2) > -1
    order = score.masked_fill(~among, -1).argsort(descending=True)[: int(among.sum())]
    running = cost[order].double().cumsum(0)
    for budget in (0.0, 1.0, 30.0, float(running[-1]) - 1e-9, 1e9):
        want = torch.zeros(500, dtype=torch.bool)
        want[order[: max(1, int((running <= budget).sum()))]] = True
        assert torch.equal(largest_within(score, cost, budget, among=among), want)
    nothing = torch.empty(0)
    assert not largest_within(nothing, nothing, 1.0, among=nothing.bool()).numel()


def test_rows_of_zeros_and_constant_ones():
    weight = drawn(4, 8)
    weight[0], weight[1] = 0.0, 0.5
    for levels in ("symmetric", "codebook"):
        stage = staged(weight, 2, levels)
        assert not stage(weight)[0].any()
        torch.testing.assert_close(stage(weight)[1], weight[1])
    weight[2, 3] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        staged(weight, 2, "symmetric")


def test_exported_integers_are_the_codes():
    weight = drawn(6, 16)
    stage = staged(weight, 3, "signed", 8)
    codes = stage.codes(weight)
    values = (codes.values.float() - codes.zero).unflatten(-1, (2, 8)) * codes.scales[..., None]
    torch.testing.assert_close(values.flatten(-2), stage(weight))
    assert staged(weight, 3, "codebook").codes(weight) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 1}, "set levels: midrise or codebook"),
        ({"weight_bits": 9}, "less than or equal to 8"),
        ({"levels": "codebook", "group_size": 8}, "remove group_size"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        parse_technique({"type": "pv_tuning", **options})


def test_groups_divide_inputs_and_weights_come_as_they_are():
    with pytest.raises(ConfigError, match="does not divide the 12 inputs of layer"):
        trained(group_size=5)
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(12, 9, bias=False)})
    sites = Sites(model)
    parse_technique({"type": "nm_sparsity"}).install(sites, None)
    (rule,) = parse_technique({"type": "pv_tuning"}).install(sites, None).step_rules
    with pytest.raises(ConfigError, match="'nm_sparsity' changes before"):
        rule.check()
