"""Early tickets: distances of masks written out, when one is drawn, and what holds from then on."""

from __future__ import annotations

import copy

import pydantic
import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.site import LinearSite
from leanmill.core.sites import Sites
from leanmill.parallel.views import NativeViews
from leanmill.recipe.root import Recipe
from leanmill.sparse.early_ticket.rule import DrawTicket
from leanmill.sparse.early_ticket.stage import TicketMask
from leanmill.sparse.units import Unit
from tests.core.tiny import context, tiny


NUM_STEPS, SPARSITY, EVERY, NUM_MASKS = 24, 0.5, 2, 3
SHAPES = [(6, 9), (4, 6)]


class Setting:
    """Two layers of odd shapes whose weights move by less and less."""

    def __init__(self, tolerance=0.1, latest=0.9):
        torch.manual_seed(0)
        self.model = nn.Module()
        for name, (rows, columns) in zip("ab", SHAPES, strict=True):
            site = LinearSite.adopt(nn.Linear(columns, rows, bias=False), name)
            stage = TicketMask((rows, columns))
            stage.reset_parameters()
            site.put(stage)
            setattr(self.model, name, site)
        self.sites = [self.model.a, self.model.b]
        self.optimizer = torch.optim.AdamW([site.weight for site in self.sites], lr=0.1, weight_decay=0.0)
        self.rule = DrawTicket(
            self.model,
            Unit("weight"),
            "layer",
            sparsity=SPARSITY,
            every_steps=EVERY,
            num_masks=NUM_MASKS,
            tolerance=tolerance,
            latest=latest,
        )

    @property
    def masks(self):
        return [site.stages["mask"].mask for site in self.sites]

    @torch.no_grad()
    def step(self, index, skipped=False):
        generator = torch.Generator().manual_seed(index)
        for site in self.sites:
            site.weight.grad = torch.randn(site.weight.shape, generator=generator)
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + index) ** 2
        views = NativeViews(self.model, self.optimizer)
        now = StepContext(
            step=index, num_steps=NUM_STEPS, num_micro_batches=1, views=views, skipped=torch.tensor(skipped)
        )
        self.rule.before_optimizer(now)
        if not skipped:
            self.optimizer.step()
        found = [largest_half(site.weight) for site in self.sites]
        self.rule.after_optimizer(now)
        return found


def largest_half(weight):
    order = weight.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order[: weight.numel() - round(SPARSITY * weight.numel())]] = True
    return mask.view(weight.shape)


def distance(one, other):
    return sum(int((a != b).sum()) for a, b in zip(one, other, strict=True)) / sum(mask.numel() for mask in one)


@pytest.mark.parametrize("tolerance", [0.02, 0.1])
def test_the_ticket_is_drawn_when_masks_agree(tolerance):
    setting, history, drawn = Setting(tolerance), [], None
    for index in range(NUM_STEPS):
        found = setting.step(index)
        is_due = (index + 1) % EVERY == 0
        if drawn is None and is_due:
            farthest = max((distance(found, before) for before in history[-2:]), default=1.0)
            assert setting.rule.metrics()["distance"] == pytest.approx(farthest)
            history.append(found)
            drawn = (index, found) if len(history) >= NUM_MASKS and farthest <= tolerance else None
        if drawn is None:
            assert all(mask.all() for mask in setting.masks)
            continue
        assert setting.rule.metrics()["drawn_after_steps"] == drawn[0] + 1
        for site, mask, kept in zip(setting.sites, setting.masks, drawn[1], strict=True):
            assert torch.equal(mask, kept)
            assert (site.weight[~mask] == 0).all()
            assert all((setting.optimizer.state[site.weight][key][~mask] == 0).all() for key in ("exp_avg",))
    assert drawn is not None
    assert NUM_MASKS * EVERY - 1 <= drawn[0] < 20


def test_it_is_drawn_at_the_latest():
    setting = Setting(tolerance=1e-9, latest=0.25)
    for index in range(NUM_STEPS):
        setting.step(index)
        assert all(mask.all() for mask in setting.masks) == (index < 5)


def test_a_resumed_rule_goes_on_and_a_skipped_step_is_passed_over():
    setting, other = Setting(), Setting()
    for index in range(4):
        setting.step(index)
    for site, twin in zip(setting.sites, other.sites, strict=True):
        twin.load_state_dict(site.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(setting.optimizer.state_dict()))
    other.rule.load_state_dict(setting.rule.state_dict())
    for index in range(4, NUM_STEPS):
        for one in (setting, other):
            one.step(index, skipped=index == 5)
        assert setting.rule.state_dict() == other.rule.state_dict()
        assert index > 5 or setting.rule.state_dict()["num_found"] == 2
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(setting.sites, other.sites, strict=True))
    assert setting.rule.state_dict()["drawn_at"] is not None


def test_what_does_not_fit_is_refused():
    with pytest.raises(pydantic.ValidationError, match="early_ticket with pattern block and block_shape None; set"):
        parse_technique({"type": "early_ticket", "pattern": "block"})
    rows = parse_technique({"type": "early_ticket", "pattern": "row", "sparsity": 0.99})
    with pytest.raises(ConfigError, match=r"early_ticket.sparsity=0.99 leaves none of 32 rows of .*q_proj \[32, 32\]"):
        rows.install(Sites(tiny()), context())
    recipe = {
        "model": {"config": {"model_type": "llama"}},
        "data": {"source": {"type": "local_corpus"}},
        "techniques": [{"type": "early_ticket"}],
        "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        "train": {"steps": 100},
    }
    with pytest.raises(pydantic.ValidationError, match="set early_ticket.compare_every_steps to at most 10"):
        Recipe.model_validate(recipe)
    with pytest.raises(
        pydantic.ValidationError, match="set train.steps to 10 or more, or lower early_ticket.num_masks"
    ):
        Recipe.model_validate(recipe | {"train": {"steps": 8}})
