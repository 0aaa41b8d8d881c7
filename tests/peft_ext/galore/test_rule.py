"""When subspaces are found anew, and what is found, kept and refused."""

from __future__ import annotations

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.parameters import TrainableSchedule
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.parallel.launch import Ranks
from leanmill.parallel.views import NativeViews
from leanmill.peft_ext.galore.config import GaLore
from leanmill.peft_ext.galore.rule import RefreshSubspaces, aligned
from leanmill.peft_ext.galore.stage import OVERSAMPLE
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import install_techniques
from tests.contract_models import MODEL
from tests.contract_training import recipe_of, train
from tests.core.tiny import context, install, tiny, tokens


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
TARGETS = ["q_proj", "gate_proj"]
SKIPPED, DONE = torch.tensor(True), torch.tensor(False)


class Steps:
    """Steps of a tiny model without an engine; the optimizer is plain descent."""

    def __init__(self, family="llama", **options):
        self.model = tiny(family)
        raw = {"type": "galore", "rank": 4, "targets": TARGETS, **options}
        self.rule = install(self.model, raw).step_rules[0]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.1)
        self.stages = {name: (site, site.weight_stages()[0]) for name, site in iter_sites(self.model)}

    def __call__(self, step, *, skipped=DONE, spoil=1.0):
        views = NativeViews(self.model, self.optimizer)
        context = StepContext(step=step, num_steps=9, num_micro_batches=2, views=views, skipped=skipped)
        self.rule.begin_step(context)
        for number in range(2):
            ids = tokens(seed=10 * step + number)
            (self.model(ids, labels=ids, use_cache=False).loss * spoil).backward()
        with torch.no_grad():
            self.rule.before_optimizer(context)
            if not skipped:
                self.optimizer.step()
            self.rule.after_optimizer(context)
        self.optimizer.zero_grad()

    def bases(self):
        return {name: stage.basis.detach().clone() for name, (_, stage) in self.stages.items()}

    def weights(self):
        return {name: site.effective_weight().detach() for name, (site, _) in self.stages.items()}


def gradients(model_of, step):
    """Of the whole weights, by autograd, at the weights as they are."""
    plain = tiny()
    state = {name: value for name, value in model_of.model.state_dict().items() if ".stages." not in name}
    plain.load_state_dict({**state, **{f"{name}.weight": value for name, value in model_of.weights().items()}})
    for number in range(2):
        ids = tokens(seed=10 * step + number)
        plain(ids, labels=ids, use_cache=False).loss.backward()
    return {name: plain.get_parameter(f"{name}.weight").grad for name in model_of.stages}


def equal(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("subspace", ["svd", "sketch", "random"])
def test_subspaces_change_every_so_many_steps_and_weights_do_not(subspace):
    steps = Steps(every_steps=3, subspace=subspace)
    changed = []
    for step in range(3):
        before = steps.bases()
        steps(step)
        changed.append(not equal(steps.bases(), before))
    assert changed == [True, False, False]
    before, weights = steps.bases(), steps.weights()
    assert all(stage.coordinates.any() for _, stage in steps.stages.values())
    steps.optimizer.param_groups[0]["lr"] = 0.0
    steps(3)
    assert not equal(steps.bases(), before)
    assert all(torch.allclose(weight, weights[name], atol=1e-6) for name, weight in steps.weights().items())
    assert not any(stage.coordinates.any() for _, stage in steps.stages.values())


def test_a_sketch_finds_nearly_what_the_gradient_has():
    steps = Steps(subspace="sketch", rank=8)
    expected = gradients(steps, 0)
    steps(0)
    for name, (_, stage) in steps.stages.items():
        gradient, basis = expected[name], stage.basis
        seen = basis.T @ gradient if stage.is_left else gradient @ basis.T
        best = torch.linalg.svdvals(gradient)[:8].norm()
        assert seen.norm() > 0.85 * best, name
        assert stage.bytes_watched == 4 * 32 * (8 + OVERSAMPLE)


@pytest.mark.parametrize("subspace", ["svd", "sketch"])
def test_a_step_that_is_not_finite_is_made_up_for(subspace):
    steps = Steps(every_steps=3, subspace=subspace, natural={"history": 2})
    before = steps.bases()
    steps(0, skipped=SKIPPED, spoil=float("nan"))
    assert equal(steps.bases(), before)
    assert all((gradient == 0).all() for _, stage in steps.stages.values() for gradient in stage.past)
    steps(1)
    found = steps.bases()
    assert not equal(found, before)
    steps(2)
    assert equal(steps.bases(), found)


def test_a_weight_that_begins_to_train_gets_a_subspace_of_its_own():
    steps = Steps(every_steps=100)
    steps(0)
    (first, (_, stage)), *others = steps.stages.items()
    stage.coordinates.requires_grad_(False)
    before = steps.bases()
    steps(1)
    assert equal(steps.bases(), before)
    stage.coordinates.requires_grad_(True)
    steps(2)
    after = steps.bases()
    assert not torch.equal(after.pop(first), before.pop(first))
    assert equal(after, before)


def test_what_is_due_is_known_after_a_resume():
    steps = Steps(every_steps=100)
    steps(0)
    resumed = RefreshSubspaces(steps.model, source="svd", every_steps=100, damping=0.0, seed=0)
    resumed.load_state_dict(steps.rule.state_dict())
    assert resumed.metrics() == steps.rule.metrics()
    assert 0 < resumed.metrics()["gradient_in_subspace"] < 1
    steps.rule, before = resumed, steps.bases()
    steps(1)
    assert equal(steps.bases(), before)


def test_signs_go_on():
    old = torch.eye(3)
    assert torch.equal(aligned(-old, old, is_left=True), old)
    assert torch.equal(aligned(old.flip(0), old, is_left=False), old.flip(0))


def test_layers_that_take_turns_train_in_subspaces():
    given = recipe_of((), {"type": "single"}, "", 1).model_dump()
    given["techniques"] = [
        {"type": "lisa", "num_layers": 1, "every_steps": 1},
        {"type": "galore", "rank": 4, "every_steps": 100},
    ]
    given["model"]["config"] = MODEL | {"num_hidden_layers": 3}
    engine, loop = train(Recipe.model_validate(given), ONE)
    schedule = loop.step_rules[0].schedule
    assert isinstance(schedule, TrainableSchedule)
    drawn = {
        path for step in range(3) for path in schedule.trained({f"model.layers.{n}.mlp.x" for n in range(3)}, step)
    }
    for name, site in iter_sites(engine.module.model):
        moved = (site.weight_stages()[0].coordinates != 0).any()
        assert bool(moved) == any(path.startswith(".".join(name.split(".")[:3])) for path in drawn), name


def refused(match, changes, **options):
    given = recipe_of((), {"type": "single"}, "", 1).model_dump()
    given["techniques"] = [{"type": "galore", "rank": 4, **options}]
    for key, value in changes.items():
        given[key] = {**given[key], **value} if isinstance(given[key], dict) else value
    with pytest.raises(ValueError, match=match):
        train(Recipe.model_validate(given), ONE, num_steps=0)


def test_what_does_not_fit_is_refused():
    refused("set rank: 16 or less", {}, rank=17)
    refused("set galore.scale", {}, lr_factor=0.5)
    refused("not decayed", {}, weight_decay=0.1)
    refused("set model.frozen_dtype=auto", {"model": {"frozen_dtype": "int8"}})
    nvme = {"engine": {"type": "deepspeed", "stage": 3, "offload_optimizer": {"device": "nvme", "path": "/x"}}}
    refused("device=cpu", nvme)
    refused("all experts", {"engine": {"type": "fsdp"}, "layout": {"ep": 2}})
    with pytest.raises(ConfigError, match="seed"):
        install_techniques([GaLore(rank=4)], tiny(), context(seed=None))
