"""Gradual pruning against the paper's schedule and a sort, with the state of an optimizer."""

from __future__ import annotations

import itertools

import pydantic
import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.site import LinearSite
from leanmill.core.sites import Sites
from leanmill.optim.pulled import PulledAdamW
from leanmill.parallel.optimizer_state import allocate_state
from leanmill.parallel.views import NativeViews
from leanmill.recipe.root import Recipe
from leanmill.sparse.gradual_pruning.curvature import Curvature, PruneByCurvature
from leanmill.sparse.gradual_pruning.rule import PruneGradually
from leanmill.sparse.gradual_pruning.stage import GradualMask
from leanmill.sparse.inverse_fisher import Inverse, SharedInverse
from leanmill.sparse.schedule import GrowingSparsity, Interval
from leanmill.sparse.scores import CRITERIA
from leanmill.sparse.units import Unit
from tests.core.tiny import context, tiny


NUM_STEPS, INITIAL, FINAL, EVERY = 20, 0.1, 0.7, 3
SHAPES = [(6, 9), (4, 6)]
BLOCK = (2, 3)
UNITS = {"weight": Unit("weight"), "block": Unit("block", BLOCK), "row": Unit("row"), "column": Unit("column")}


class Setting:
    """Two layers of odd shapes, their masks, AdamW, and the rule."""

    def __init__(self, criterion="magnitude", unit="weight", scope="layer", dtype=torch.float32):
        torch.manual_seed(0)
        self.model = nn.Module()
        for name, (rows, columns) in zip("ab", SHAPES, strict=True):
            site = LinearSite.adopt(nn.Linear(columns, rows, bias=False, dtype=dtype), name)
            stage = GradualMask((rows, columns))
            stage.reset_parameters()
            site.put(stage)
            setattr(self.model, name, site)
        self.sites = [self.model.a, self.model.b]
        kept = {"params": [site.weight for site in self.sites], "kept": 1}
        self.optimizer = PulledAdamW([kept], lr=0.05, weight_decay=0.1, betas=(0.9, 0.95))
        self.movement = [torch.zeros_like(site.weight) for site in self.sites]
        allocate_state(self.optimizer)
        schedule = GrowingSparsity(
            initial=INITIAL, final=FINAL, interval=Interval(begin=0.1, end=0.7), every_steps=EVERY
        )
        self.rule = PruneGradually(self.model, schedule, CRITERIA[criterion], UNITS[unit], scope)

    @property
    def masks(self):
        return [site.stages["mask"].mask for site in self.sites]

    @torch.no_grad()
    def step(self, step, skipped=False):
        """What the loop does in a step; returns what each criterion sees of each layer, written out."""
        for site in self.sites:
            inputs = torch.randn(5, site.in_features, dtype=site.weight.dtype)
            with torch.enable_grad():
                (site(inputs) - 1).square().mean().backward()
        seen = {"gradient": [(site.weight * site.weight.grad).abs() for site in self.sites]}
        for site, total in zip(self.sites, self.movement, strict=True):
            total -= 0 if skipped else site.weight * site.weight.grad * site.stages["mask"].mask
        seen["movement"] = self.movement
        views = NativeViews(self.model, self.optimizer)
        now = StepContext(
            step=step, num_steps=NUM_STEPS, num_micro_batches=1, views=views, skipped=torch.tensor(skipped)
        )
        self.rule.before_optimizer(now)
        if not skipped:
            self.optimizer.step()
            moments = [self.optimizer.state[site.weight]["exp_avg_sq"] for site in self.sites]
            seen["magnitude"] = [site.weight.abs() for site in self.sites]
            seen["fisher"] = [(w**2 * v).sqrt() for w, v in zip(seen["magnitude"], moments, strict=True)]
        self.optimizer.zero_grad()
        self.rule.after_optimizer(now)
        return seen


def units_of(values, unit):
    """A number for every unit of [rows, columns]: its sum; and the number of each element's unit."""
    rows, columns = {"weight": (1, 1), "block": BLOCK, "row": (1, values.shape[1]), "column": (values.shape[0], 1)}[
        unit
    ]
    across = values.shape[1] // columns
    of = torch.tensor(
        [[r // rows * across + c // columns for c in range(values.shape[1])] for r in range(values.shape[0])]
    )
    sums = [values[of == number].double().mean().item() for number in range(int(of.max()) + 1)]
    return sums, of


def by_hand(scores, masks, unit, scope, sparsity):
    """Sort units by score, of equal ones the first first, and keep those that are on and come first."""
    layers = [
        (units_of(score * mask, unit)[0], *units_of(mask, unit)) for score, mask in zip(scores, masks, strict=True)
    ]
    groups = [range(len(layers))] if scope == "global" else [[i] for i in range(len(layers))]
    kept = set()
    for group in groups:
        units = [(i, u) for i in group for u in range(len(layers[i][0]))]
        alive = [(i, u) for i, u in units if layers[i][1][u] > 0]
        alive.sort(key=lambda unit: -layers[unit[0]][0][unit[1]])
        kept |= set(alive[: len(units) - round(sparsity * len(units))])
    return [torch.tensor([(i, u) in kept for u in range(len(sums))])[of] for i, (sums, _, of) in enumerate(layers)]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_masks_are_those_of_a_sort_at_the_papers_sparsity(criterion, unit, scope):
    setting, updates = Setting(criterion, unit, scope), []
    first, last = 2, 14  # 0.1 and 0.7 of the run
    for step in range(NUM_STEPS):
        before = [mask.clone() for mask in setting.masks]
        seen = setting.step(step)
        for site, mask in zip(setting.sites, setting.masks, strict=True):
            assert (site.weight[~mask] == 0).all()
            state = setting.optimizer.state[site.weight]
            assert all((state[key][~mask] == 0).all() for key in ("exp_avg", "exp_avg_sq"))
        if step != last and (not first <= step < last or (step - first) % EVERY):
            assert all(torch.equal(mask, was) for mask, was in zip(setting.masks, before, strict=True))
            continue
        sparsity = FINAL + (INITIAL - FINAL) * (1 - (step - first) / (last - first)) ** 3
        updates.append(sparsity)
        expected = by_hand(seen[criterion], before, unit, scope, sparsity)
        assert all(torch.equal(mask, want) for mask, want in zip(setting.masks, expected, strict=True)), step
    assert updates[0] == pytest.approx(INITIAL)
    assert updates[-1] == pytest.approx(FINAL)
    assert len(updates) == 5
    active, total = sum(int(mask.sum()) for mask in setting.masks), sum(mask.numel() for mask in setting.masks)
    assert setting.rule.metrics() == {"sparsity": pytest.approx(1 - active / total)}


def curved(setting, sparsity):
    """What pruning to `sparsity` by M-FAC leaves of each layer, with the Fisher matrix written out: masks, weights."""
    found = []
    for site, recent in zip(setting.sites, setting.recent, strict=True):
        weight, on = site.weight.detach().double(), site.stages["mask"].mask
        gradients = torch.stack(recent).double() * on
        inverse = torch.zeros(*weight.shape, weight.shape[1], dtype=torch.float64)
        for row, start in itertools.product(range(weight.shape[0]), range(0, weight.shape[1], 4)):
            block = gradients[:, row, start : start + 4]
            f = block.T @ block / 3 + 0.1 * gradients.square().mean() * torch.eye(block.shape[1])
            inverse[row, start : start + 4, start : start + 4] = f.inverse()
        diagonal = torch.stack([inverse[row].diagonal() for row in range(len(weight))])
        score = torch.where(on, weight**2 / diagonal, -1.0)
        keep = torch.zeros(on.numel(), dtype=torch.bool)
        keep[score.flatten().argsort(descending=True)[: on.numel() - round(sparsity * on.numel())]] = True
        keep = keep.view(on.shape)
        lost = torch.where(on & ~keep, -weight / diagonal, 0.0)
        found.append((keep, torch.where(keep, weight + (inverse @ lost.unsqueeze(-1)).squeeze(-1), 0.0).float()))
    return found


def test_pruning_by_curvature_is_that_of_the_inverse_written_out():
    setting = Setting()
    kept = {"params": [site.weight for site in setting.sites], "kept": 3}
    setting.optimizer = PulledAdamW([kept], lr=0.05, betas=(0.9, 0.95))
    allocate_state(setting.optimizer)
    curvature = Curvature(num_gradients=3, block_size=4, damping=0.1)
    setting.rule = PruneByCurvature(setting.model, setting.rule.schedule, "layer", curvature)
    setting.recent = [[torch.zeros_like(site.weight)] * 3 for site in setting.sites]
    original, now = setting.optimizer.step, {}

    def step_and_predict():
        for recent, gradient in zip(setting.recent, now["gradients"], strict=True):
            recent[now["step"] % 3] = gradient  # a skipped step leaves an older one
        original()
        now["predicted"] = curved(setting, now["sparsity"])

    setting.optimizer.step = step_and_predict
    look = setting.rule.look

    def note(site, weight, mask, gradient, context):
        now.setdefault("gradients", []).append(gradient.clone())
        look(site, weight, mask, gradient, context)

    setting.rule.look = note
    for step in range(15):
        now.clear()
        now["step"] = step
        now["sparsity"] = FINAL + (INITIAL - FINAL) * (1 - (step - 2) / 12) ** 3
        setting.step(step, skipped=step == 7)
        if step >= 2 and step % 3 == 2:
            for site, (keep, value) in zip(setting.sites, now["predicted"], strict=True):
                assert torch.equal(site.stages["mask"].mask, keep), step
                torch.testing.assert_close(site.weight.detach(), value, rtol=1e-4, atol=1e-5)


def test_both_inverses_are_one():
    setting = Setting()
    view = NativeViews(setting.model, setting.optimizer).of(setting.sites[0].weight)
    gradients = torch.randn(5, 6, 9)
    mine = SharedInverse(view, list(gradients), torch.ones(6, 9, dtype=torch.bool), block_size=9, damping=0.3)
    theirs = Inverse(gradients.transpose(0, 1).double(), 0.3 * float(gradients.square().mean()) * 5)
    torch.testing.assert_close(mine.diagonal(), theirs.diagonal())
    vector = torch.randn(6, 9)
    torch.testing.assert_close(mine.times(vector), theirs.times(vector.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_masked_and_the_gradient_is_dense(dtype):
    setting = Setting(dtype=dtype)
    site, mask = setting.sites[0], setting.masks[0]
    mask.copy_(torch.rand(mask.shape) < 0.5)
    inputs, upstream = torch.randn(3, 9, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    out = site(inputs)
    out.backward(upstream)
    masked = torch.where(mask, site.weight.detach(), 0).requires_grad_()
    expected = nn.functional.linear(inputs, masked)
    expected.backward(upstream)
    assert torch.equal(out, expected)
    assert torch.equal(site.weight.grad, masked.grad)


def test_what_a_skipped_step_owes_is_done_in_the_next_one_and_over_a_resume():
    setting = Setting("gradient")
    for step in range(14):
        setting.step(step)
    before = [mask.clone() for mask in setting.masks]
    setting.step(14, skipped=True)
    assert all(torch.equal(mask, was) for mask, was in zip(setting.masks, before, strict=True))
    state = setting.rule.state_dict()
    again = Setting("gradient").rule
    again.load_state_dict(state)
    assert again.state_dict() == state
    setting.step(15)
    assert [int(mask.sum()) for mask in setting.masks] == [54 - round(0.7 * 54), 24 - round(0.7 * 24)]
    assert "is_owed" not in setting.rule.state_dict()


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
@pytest.mark.parametrize("unit", UNITS)
def test_constant_empty_and_broken_weights(unit, value):
    setting = Setting(unit=unit, scope="global")
    setting.optimizer.step = lambda: None
    setting.sites[0].weight.data.fill_(value)
    setting.sites[0].weight.grad = None
    for step in range(NUM_STEPS):
        views = NativeViews(setting.model, setting.optimizer)
        now = StepContext(step=step, num_steps=NUM_STEPS, num_micro_batches=1, views=views, skipped=torch.tensor(False))
        setting.rule.before_optimizer(now)
        setting.rule.after_optimizer(now)
    counted = [len(units_of(mask, unit)[0]) for mask in setting.masks]
    on = [sum(total > 0 for total in units_of(mask, unit)[0]) for mask in setting.masks]
    assert sum(on) == sum(counted) - round(FINAL * sum(counted))
    # Of what is zero goes first, and what is no number last: a loss that is none is seen.
    if value == 0.0:
        assert on[1] == min(counted[1], sum(on))
    if value != value:
        assert on[0] == min(counted[0], sum(on))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begin": 0.8}, "begin 0.8 is not before end 0.75"),
        ({"initial_sparsity": 0.9}, "initial_sparsity 0.9 is not below sparsity 0.8"),
        ({"pattern": "block"}, r"set pattern: block and block_shape: \[4, 4\] together"),
        ({"block_shape": [4, 4]}, "or neither"),
        ({"mfac_damping": 0.5}, "mfac_damping is for criterion: mfac"),
        ({"criterion": "mfac", "pattern": "row"}, "type pattern: unstructured"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        parse_technique({"type": "gradual_pruning", **fields})


def test_weights_that_do_not_fit_are_refused():
    blocks = parse_technique({"type": "gradual_pruning", "pattern": "block", "block_shape": [5, 4]})
    with pytest.raises(ConfigError, match=r"q_proj: blocks of 5 x 4 do not divide its weight \[32, 32\]; add"):
        blocks.install(Sites(tiny()), context())
    rows = parse_technique({"type": "gradual_pruning", "pattern": "row", "sparsity": 0.99})
    with pytest.raises(ConfigError, match=r"leaves none of 32 rows of .*q_proj \[32, 32\]; lower it"):
        rows.install(Sites(tiny()), context())


def test_the_fisher_criterion_wants_second_moments():
    recipe = {
        "model": {"config": {"model_type": "llama"}},
        "data": {"source": {"type": "local_corpus"}},
        "techniques": [{"type": "gradual_pruning", "criterion": "fisher"}],
        "optimizer": {"type": "lion", "lr": 1e-4},
        "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        "train": {"steps": 8},
    }
    with pytest.raises(
        pydantic.ValidationError,
        match="second moments of gradients, and optimizer.type=lion keeps none; set .*, or gradual_pruning.crit",
    ):
        Recipe.model_validate(recipe)
