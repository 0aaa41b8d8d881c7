"""Decay beside Adam's moments, dense ends and flip rates, against the papers' equations written out."""

from __future__ import annotations

import pydantic
import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.kernels.nm_mask.naive import nm_mask_by_sort
from leanmill.kernels.nm_mask.op import nm_mask
from leanmill.optim.pulled import PulledAdamW
from leanmill.parallel.optimizer_state import allocate_state
from leanmill.parallel.views import NativeViews
from leanmill.recipe.root import Recipe
from leanmill.sparse.nm_sparsity.config import NMSparsity
from leanmill.sparse.schedule import WarmedUp
from tests.core.tiny import install, loss_of, tiny, tokens


NUM_STEPS, DECAY = 6, 0.3
ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1}


class Setting:
    """A tiny model in fp64 with its optimizer, trained as the loop does it."""

    def __init__(self, **fields):
        self.model = tiny().double()
        self.installed = install(self.model, {"type": "nm_sparsity", "num_kept": 1, "decay": DECAY, **fields})
        self.rules = self.installed.step_rules
        self.weights = {name: site.raw_weight for name, site in iter_sites(self.model) if site.stages}
        pulls = {rule.settings.pull for rule in self.installed.param_rules}
        pull = pulls.pop() if pulls else None
        if pull is not None:
            assert {name for name in self.weights if self.installed.param_rules[0].match(f"{name}.weight")} == set(
                self.weights
            )
        self.optimizer = PulledAdamW([{"params": list(self.weights.values()), "pull": pull}], **ADAM)
        allocate_state(self.optimizer)

    def step(self, index, skipped=False, is_reported=True):
        """Take one step; return weights before it and gradients, by name."""
        now = StepContext(
            step=index,
            num_steps=NUM_STEPS,
            num_micro_batches=1,
            views=NativeViews(self.model, self.optimizer),
            is_reported=is_reported,
            skipped=torch.tensor(skipped),
        )
        for rule in self.rules:
            rule.begin_step(now)
        loss_of(self.model, tokens(seed=index)).backward()
        with torch.no_grad():
            for rule in self.rules:
                rule.before_optimizer(now)
            seen = {name: (w.detach().clone(), w.grad.clone()) for name, w in self.weights.items()}
            if not skipped:
                self.optimizer.step()
            self.optimizer.zero_grad()
            for rule in self.rules:
                rule.after_optimizer(now)
        return seen


def decay_at(step, warmup):
    return DECAY if step >= warmup * NUM_STEPS else DECAY * step / (warmup * NUM_STEPS)


@pytest.mark.parametrize("warmup", [0.0, 0.5])
@pytest.mark.parametrize("decay_on", ["update", "weight"])
def test_updates_are_the_papers(decay_on, warmup):
    setting = Setting(decay_on=decay_on, decay_warmup=warmup)
    (b1, b2), lr, wd = ADAM["betas"], ADAM["lr"], ADAM["weight_decay"]
    m, v = ({name: torch.zeros_like(w) for name, w in setting.weights.items()} for _ in range(2))
    for index in range(NUM_STEPS):
        for name, (w, g) in setting.step(index).items():
            pull = decay_at(index, warmup) * w * ~nm_mask_by_sort(w, 1, 4)
            m[name] = b1 * m[name] + (1 - b1) * g
            u = m[name] + pull if decay_on == "update" else m[name]
            v[name] = b2 * v[name] + (1 - b2) * (u if decay_on == "update" else g) ** 2
            t = index + 1
            move = u / (1 - b1**t) / ((v[name] / (1 - b2**t)).sqrt() + ADAM["eps"])
            beside = pull if decay_on == "weight" else 0
            expected = w - lr * (wd * w + beside + move)
            assert (setting.weights[name] - expected).abs().max() < 1e-14, name


def test_the_warm_up_of_the_published_rule():
    plain, warm = Setting(gradient="straight_through"), Setting(decay_warmup=0.5)
    assert [WarmedUp(strength=DECAY, share=0.5).at(i, NUM_STEPS) for i in range(4)] == [
        0,
        DECAY / 3,
        2 * DECAY / 3,
        DECAY,
    ]
    for index in range(NUM_STEPS):
        with torch.no_grad():
            for name, weight in plain.weights.items():
                weight.copy_(warm.weights[name])
        seen = plain.step(index)
        for name, (w, g) in warm.step(index).items():
            decay = decay_at(index, 0.5) * w * ~nm_mask_by_sort(w, 1, 4)
            assert (g - seen[name][1] - decay).abs().max() < 1e-14, name


@pytest.mark.parametrize("decay_on", ["gradient", "update"])
def test_the_end_is_dense_and_decays_nothing(decay_on):
    setting = Setting(decay_on=decay_on, dense_at_end=0.34)
    for index in range(NUM_STEPS):
        is_dense = index >= 4  # 0.66 of six steps is 3.96
        seen = setting.step(index)
        site = next(site for _, site in iter_sites(setting.model) if site.stages)
        before, gradient = seen[site.site_name]
        kept = (site.stages["mask"](before) != 0).float().mean()
        assert kept == (1.0 if is_dense else 0.25)
        assert (site.stages["mask"].pattern() is None) == is_dense
        if decay_on == "update":
            assert bool((setting.optimizer.state[site.raw_weight]["pull"] == 0).all()) == is_dense
        elif is_dense:
            dense = tiny().double()
            dense.load_state_dict({k: v for k, v in setting.model.state_dict().items() if "stages" not in k})
            # The step has written the weights since.
            for name, part in dense.named_modules():
                if name in seen:
                    part.weight = nn.Parameter(seen[name][0])
            loss_of(dense, tokens(seed=index)).backward()
            torch.testing.assert_close(gradient, dense.get_submodule(site.site_name).weight.grad)


@pytest.mark.parametrize("transposable", [False, True])
def test_flip_rates_are_those_of_the_masks(transposable):
    setting = Setting(log_flips=True, transposable=transposable, num_kept=2, dense_at_end=0.34)
    masks = {}
    for index in range(NUM_STEPS):
        seen = setting.step(index, is_reported=index != 2)
        after = {n: nm_mask(w.detach(), 2, 4, transposable=transposable) for n, w in setting.weights.items()}
        before = {n: nm_mask(w, 2, 4, transposable=transposable) for n, (w, _) in seen.items()}
        flips = sum(int((after[n] != before[n]).sum()) for n in after)
        rate = flips / sum(mask.numel() for mask in after.values())
        if index != 2:
            masks[index] = rate
            assert rate > 0
        assert setting.rules[0].metrics()["flip_rate"] == masks[min(index, 1) if index == 2 else index]
    state = setting.rules[0].state_dict()
    again = Setting(log_flips=True, transposable=transposable, num_kept=2, dense_at_end=0.34).rules[0]
    again.load_state_dict(state)
    assert again.metrics() == setting.rules[0].metrics()
    setting.step(5, skipped=True)
    assert setting.rules[0].metrics()["flip_rate"] == 0


def test_a_mask_of_a_changed_weight_is_refused():
    rotated = {"type": "quest", "activation_bits": None}
    with pytest.raises(ConfigError, match=r"'quest' changes the weight before the mask; set nm_sparsity.decay_on: gr"):
        install(tiny(), {"type": "nm_sparsity", "decay_on": "weight"}, rotated)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient": "straight_through", "decay_on": "update"}, "decay_on is of gradient: sr_ste"),
        ({"gradient": "masked", "decay_warmup": 0.1}, "decay_warmup is of gradient: sr_ste"),
        ({"progressive": {}, "dense_at_end": 0.1}, "progressive ends under the plain mask"),
        ({"dense_at_end": 1.0}, "less than 1"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        NMSparsity(**fields)


@pytest.mark.parametrize(
    ("optimizer", "message"), [("lion", "or nm_sparsity.decay_on=grad"), ("adamw8bit", "adamw or")]
)
def test_other_optimizers_are_refused(optimizer, message):
    recipe = {
        "model": {"config": {"model_type": "llama"}},
        "data": {"source": {"type": "local_corpus"}},
        "techniques": [{"type": "nm_sparsity", "decay_on": "update"}],
        "optimizer": {"type": optimizer, "lr": 1e-4},
        "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        "train": {"steps": 8},
    }
    with pytest.raises(pydantic.ValidationError, match=message):
        Recipe.model_validate(recipe)
