"""Drop and grow against the paper's algorithm 1 written out, with the state of an optimizer."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext
from leanmill.core.site import LinearSite
from leanmill.core.stage import Slot, Stage
from leanmill.parallel.views import NativeViews
from leanmill.sparse.rigl.rule import MoveMasks, Schedule
from leanmill.sparse.rigl.stage import MovingMask


NUM_STEPS, EVERY, ALPHA, UNTIL = 40, 4, 0.5, 0.5


class Setting:
    """One layer of odd shape, its mask, an optimizer, and the rule."""

    def __init__(self, method="rigl", shape=(7, 5), num_active=11, optimizer=torch.optim.AdamW, **options):
        self.model = nn.Module()
        self.site = LinearSite.adopt(nn.Linear(shape[1], shape[0], bias=False), "layer")
        self.model.layer = self.site
        stage = MovingMask(shape, num_active)
        stage.reset_parameters()
        self.site.put(stage)
        self.mask, self.weight = stage.mask, self.site.weight
        self.optimizer = optimizer([self.weight], lr=0.05, weight_decay=0.1, **options)
        schedule = Schedule(every_steps=EVERY, drop_fraction=ALPHA, until=UNTIL)
        self.rule = MoveMasks(self.model, method, schedule, seed=3)
        self.inputs = torch.randn(6, shape[1])

    @torch.no_grad()
    def step(self, step, gradient=None, skipped=False):
        """What the loop does in a step; returns the dense gradient."""
        with torch.enable_grad():
            (self.site(self.inputs) - self.inputs.new_ones(()) * step).square().mean().backward()
        if gradient is not None:
            self.weight.grad.copy_(gradient)
        dense = None if self.weight.grad is None else self.weight.grad.clone()
        context = SimpleNamespace(views=NativeViews(self.model, self.optimizer), step=step, num_steps=NUM_STEPS)
        context = StepContext(num_micro_batches=1, **vars(context), skipped=torch.tensor(skipped))
        self.rule.before_optimizer(context)
        if not skipped and not self.rule.replaces_optimizer(context):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.rule.after_optimizer(context)
        return dense


def _ranked(score, candidates):
    """Flat indices of the candidates, largest score first, ties by index."""
    return sorted(candidates, key=lambda i: (-float(score.flatten()[i]), i))


def _algorithm_1(weight, mask, growth, step):
    """I_active of the paper: drop the smallest active, grow the best of what is not kept."""
    fraction = ALPHA / 2 * (1 + math.cos(step * math.pi / (UNTIL * NUM_STEPS)))
    active = mask.flatten().nonzero().flatten().tolist()
    num_dropped = int(fraction * len(active))
    kept = _ranked(weight.abs(), active)[: len(active) - num_dropped]
    others = [i for i in range(mask.numel()) if i not in kept]
    grown = _ranked(growth.abs(), others)[:num_dropped]
    moved = torch.zeros(mask.numel(), dtype=torch.bool)
    moved[kept + grown] = True
    return moved.view(mask.shape), num_dropped


def test_rigl_moves_by_algorithm_1():
    setting = Setting()
    moves = 0
    for step in range(NUM_STEPS):
        before = setting.weight.detach().clone(), setting.mask.clone()
        moments = {k: v.clone() for k, v in setting.optimizer.state[setting.weight].items()}
        dense = setting.step(step)
        due = step > 0 and step % EVERY == 0 and step < UNTIL * NUM_STEPS
        assert (setting.weight[~setting.mask] == 0).all()
        if not due:
            assert torch.equal(setting.mask, before[1])
            assert step == 0 or not torch.equal(setting.weight, before[0])
            continue
        expected, num_dropped = _algorithm_1(*before, dense, step)
        assert torch.equal(setting.mask, expected)
        assert num_dropped > 0 or step > 12
        moves += int((setting.mask != before[1]).any())
        survivors = setting.mask & before[1]
        # The optimizer takes no step; what returns keeps its value and moments, what is new starts at 0.
        assert torch.equal(setting.weight, before[0] * survivors)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(setting.optimizer.state[setting.weight][key], moments[key] * survivors), key
        assert setting.optimizer.state[setting.weight]["step"] == moments["step"]
        assert setting.rule.metrics() == {"density": 11 / 35, "num_moved": float((setting.mask & ~before[1]).sum())}
    assert moves > 2


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_weights_of_all_layers_compete_for_one_budget(method):
    torch.manual_seed(0)
    model, counts = nn.Module(), {"first": (3, 5, 6), "second": (4, 3, 9)}
    for name, (num_out, num_in, num_active) in counts.items():
        site = LinearSite.adopt(nn.Linear(num_in, num_out, bias=False), name)
        site.put(MovingMask((num_out, num_in), num_active))
        site.stages["mask"].reset_parameters()
        setattr(model, name, site)
    sites = [model.first, model.second]
    optimizer = torch.optim.AdamW([site.weight for site in sites], lr=0.05)
    schedule = Schedule(every_steps=EVERY, drop_fraction=ALPHA, until=UNTIL)
    rule = MoveMasks(model, method, schedule, seed=3, scope="global")
    with torch.no_grad():
        for site in sites:
            site.weight.mul_(site.stages["mask"].mask)
    model.second.weight.data.mul_(10)  # nothing of it is dropped first
    before = [(site.weight.detach().clone(), site.stages["mask"].mask.clone()) for site in sites]
    gradients = [torch.randn_like(site.weight) * size for site, size in zip(sites, (1, 10), strict=True)]
    for site, gradient in zip(sites, gradients, strict=True):
        site.weight.grad = gradient.clone()
    with torch.no_grad():
        now = {"step": EVERY, "num_steps": NUM_STEPS, "num_micro_batches": 1, "skipped": torch.tensor(False)}
        context = StepContext(**now, views=NativeViews(model, optimizer))
        rule.before_optimizer(context)
        rule.after_optimizer(context)
    weight, mask = (torch.cat([pair[i].flatten() for pair in before]) for i in range(2))
    found = torch.cat([site.stages["mask"].mask.flatten() for site in sites])
    assert int(found.sum()) == 15
    if method == "rigl":
        expected, _ = _algorithm_1(weight, mask, torch.cat([g.flatten() for g in gradients]), EVERY)
        assert torch.equal(found, expected)
        assert int(model.first.stages["mask"].mask.sum()) < 6
    else:
        fraction = ALPHA / 2 * (1 + math.cos(EVERY * math.pi / (UNTIL * NUM_STEPS)))
        kept = _ranked(weight.abs(), mask.nonzero().flatten().tolist())[: 15 - int(fraction * 15)]
        assert found[kept].all()


def test_set_grows_at_random_after_the_step():
    first, second, other = Setting("set", (40, 30), 240), Setting("set", (40, 30), 240), Setting("set", (40, 30), 240)
    other.rule.seed = 4
    grown = []
    for setting in (first, second, other):
        torch.manual_seed(1)
        nn.init.normal_(setting.weight)
        setting.mask.copy_(torch.rand(40, 30) < 0.2)
        setting.mask.view(-1)[setting.mask.flatten().nonzero().flatten()[240:]] = False
        missing = 240 - int(setting.mask.sum())
        setting.mask.view(-1)[(~setting.mask).flatten().nonzero().flatten()[:missing]] = True
        for step in range(EVERY):
            setting.step(step)
        before, seen = setting.mask.clone(), setting.optimizer.state[setting.weight]["step"].clone()
        setting.step(EVERY)
        assert setting.optimizer.state[setting.weight]["step"] == seen + 1, "the optimizer steps as well"
        assert int(setting.mask.sum()) == 240
        new = setting.mask & ~before
        assert (setting.weight[new] == 0).all()
        assert (setting.optimizer.state[setting.weight]["exp_avg"][~setting.mask] == 0).all()
        grown.append(new)
    assert torch.equal(grown[0], grown[1])
    assert not torch.equal(grown[0], grown[2])
    # Spread over the whole layer: a quarter of the new ones in each quarter of the rows.
    quarters = torch.stack([new.view(4, 10, 30).sum((1, 2)).float() for new in grown])
    assert quarters.min() > 8


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_nothing_moves_in_a_skipped_step(method):
    setting = Setting(method)
    for step in range(EVERY):
        setting.step(step)
    weight, mask = setting.weight.detach().clone(), setting.mask.clone()
    state = {k: v.clone() for k, v in setting.optimizer.state[setting.weight].items()}
    setting.step(EVERY, gradient=torch.full((7, 5), float("nan")), skipped=True)
    assert torch.equal(setting.weight, weight)
    assert torch.equal(setting.mask, mask)
    assert all(torch.equal(setting.optimizer.state[setting.weight][k], v) for k, v in state.items())
    setting.step(2 * EVERY)
    assert not torch.equal(setting.mask, mask)


def test_what_is_not_finite_stays_so_under_the_mask():
    """Or a step with a bad gradient at a masked weight would count."""
    setting = Setting()
    setting.weight.grad = torch.zeros(7, 5)
    setting.weight.grad[~setting.mask] = float("inf")
    context = StepContext(step=1, num_steps=9, num_micro_batches=1, views=NativeViews(setting.model, setting.optimizer))
    setting.rule.before_optimizer(context)
    assert not torch.isfinite(setting.weight.grad).all()


def _note_gradient(setting, gradients, *_):
    gradients.append(setting.weight.grad.clone())


def test_masked_weights_stay_out_of_the_norm_and_at_rest():
    for optimizer, options in ((torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})):
        setting = Setting(optimizer=optimizer, **options)
        gradients: list[torch.Tensor] = []
        setting.optimizer.register_step_pre_hook(partial(_note_gradient, setting, gradients))
        for step in range(EVERY):
            setting.step(step)
            assert (setting.weight[~setting.mask] == 0).all()
        assert all((gradient[~setting.mask] == 0).all() for gradient in gradients)
        assert all((gradient[setting.mask] != 0).all() for gradient in gradients)


def test_another_number_of_active_weights_is_reached_by_the_next_update():
    setting = Setting()
    setting.site.stage(Slot.MASK).num_active = 20
    for step in range(EVERY + 1):
        setting.step(step)
    assert int(setting.mask.sum()) == 20


def test_without_dropping_masks_rest_and_every_step_is_the_optimizers():
    still = Schedule(every_steps=EVERY, drop_fraction=0.0, until=UNTIL)
    assert not any(still.is_due(step, NUM_STEPS) for step in range(NUM_STEPS))


@pytest.mark.parametrize("method", ["rigl", "set"])
def test_a_layer_that_does_not_train_for_a_while_keeps_its_mask(method):
    setting = Setting(method)
    for step in range(EVERY):
        setting.step(step)
    setting.weight.requires_grad_(False)
    setting.optimizer.step = lambda: None
    setting.inputs.requires_grad_()
    mask = setting.mask.clone()
    setting.step(EVERY)
    assert torch.equal(setting.mask, mask)
    assert setting.rule.metrics() == {}


class Delta(Stage):
    slot, technique = Slot.DELTA, "delta"


def test_refusals():
    frozen = Setting()
    frozen.weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="rigl moves layer, but another technique freezes it"):
        frozen.rule.check()
    changed = Setting()
    changed.rule.check()
    changed.site.put(Delta())
    with pytest.raises(ConfigError, match="'delta' changes before the mask; remove one"):
        changed.rule.check()
