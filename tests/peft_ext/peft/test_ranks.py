"""Who moves ranks: importance as IncreLoRA has it, growth up to the budget, orthogonality, nested ranks drawn anew."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext
from leanmill.parallel.views import NativeViews
from leanmill.peft_ext.peft.ranks import layers_of
from tests.core.tiny import install, tiny, tokens


GROWS = {"r": 4, "target_r": 2.0, "grow_layers": 2, "grow_every": 2, "grow_after": 1}
DONE = torch.tensor(False)


class Steps:
    """Steps of a tiny model without an engine, of two micro-batches each; the optimizer is plain descent."""

    def __init__(self, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = tiny()
        raw = {"type": "peft", "method": "rank_lora", "targets": ["q_proj", "down_proj"], **options}
        self.rule = install(self.model, {**raw, "init_weights": False}).step_rules[0]
        self.layers = dict(layers_of(self.model))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.trained, lr=0.1)

    def backward(self, step: int, spoil: float = 1.0) -> None:
        for number in range(2):
            ids = tokens(seed=10 * step + number)
            (self.model(ids, labels=ids, use_cache=False).loss * spoil).backward()

    def __call__(self, step: int, *, num_steps: int = 20, spoil: float = 1.0) -> None:
        views = NativeViews(self.model, self.optimizer)
        context = StepContext(step=step, num_steps=num_steps, num_micro_batches=2, views=views, skipped=DONE)
        self.rule.begin_step(context)
        self.backward(step, spoil)
        with torch.no_grad():
            self.rule.before_optimizer(context)
            if spoil == 1.0:
                self.optimizer.step()
            self.rule.after_optimizer(context)
        self.optimizer.zero_grad()

    def counts(self) -> dict[str, list[int]]:
        return {name: layer.rank_lora_count["default"].tolist() for name, layer in self.layers.items()}


def importance_by_hand(steps: Steps, step: int, score: str) -> dict[str, float]:
    """Of each layer, with dW as a leaf of its own where its gradient is asked for."""
    found: dict[str, float] = {}
    if score == "factors":
        steps.backward(step)
        for name, layer in steps.layers.items():
            a, b, e = (getattr(layer, f"rank_lora_{key}")["default"] for key in "ABE")
            parts = ((a, a.shape[1]), (b, b.shape[0]), (e, 1))
            found[name] = sum(float((p * p.grad).abs().sum().detach()) / size for p, size in parts)
        steps.optimizer.zero_grad()
        return found
    plain = tiny()
    plain.load_state_dict(
        {
            name.replace(".base_layer", ""): value
            for name, value in steps.model.state_dict().items()
            if "rank_lora" not in name
        }
    )
    deltas = {name: layer.get_delta_weight("default").detach() for name, layer in steps.layers.items()}
    for name, delta in deltas.items():
        plain.get_parameter(f"{name}.weight").data += delta
    for number in range(2):
        ids = tokens(seed=10 * step + number)
        plain(ids, labels=ids, use_cache=False).loss.backward()
    return {
        name: float((delta * plain.get_parameter(f"{name}.weight").grad).abs().sum()) / math.sqrt(delta.numel())
        for name, delta in deltas.items()
    }


@pytest.mark.parametrize("score", ["product", "factors"])
def test_scores_are_sensitivity_and_uncertainty(score: str):
    """I = b1 I + (1 - b1) s, U = b2 U + (1 - b2) |s - I|, s = sum |dW x grad| / sqrt(numel)."""
    steps = Steps(**GROWS, score=score, orthogonality=0.0, sensitivity_decay=0.8, uncertainty_decay=0.6)
    sensitivity, uncertainty = dict.fromkeys(steps.layers, 0.0), dict.fromkeys(steps.layers, 0.0)
    for step in range(2):
        found = importance_by_hand(steps, step, score)
        for name, value in found.items():
            sensitivity[name] = 0.8 * sensitivity[name] + 0.2 * value
            uncertainty[name] = 0.6 * uncertainty[name] + 0.4 * abs(value - sensitivity[name])
        steps(step)
        averages = steps.rule.state_dict()["averages"]
        for name, (got_sensitivity, got_uncertainty) in averages.items():
            assert got_sensitivity == pytest.approx(sensitivity[name], rel=1e-4)
            assert got_uncertainty == pytest.approx(uncertainty[name], rel=1e-4)
    ranking = sorted(steps.layers, key=lambda name: -sensitivity[name] * uncertainty[name])
    assert steps.counts() == {name: [2 if name in ranking[:2] else 1, 1] for name in steps.layers}


def test_the_budget_is_spent_to_the_rank_and_reserves_end_with_it():
    steps = Steps(**GROWS | {"target_r": 2.25, "grow_r": 2, "grow_layers": 3})
    for step in range(2):
        steps(step)
    assert sum(used for used, _ in steps.counts().values()) == 9, "2.25 of 4 layers: 5 more, of 6 that were offered"
    assert all(reserved == 0 for _, reserved in steps.counts().values())
    assert steps.rule.metrics()["mean_rank"] == 2.25
    before = steps.counts()
    for step in range(2, 6):
        steps(step)
        assert all(layer._collected is None for layer in steps.layers.values()), "nobody asks any more"
    assert steps.counts() == before


def test_no_layer_grows_beyond_its_ranks_and_a_spoiled_step_scores_nothing():
    steps = Steps(**GROWS | {"r": 2, "grow_layers": 4, "grow_r": 2})
    steps(0)
    kept = steps.rule.state_dict()["averages"]
    steps(1, spoil=math.nan)
    assert steps.rule.state_dict()["averages"] == kept
    assert all(count == [2, 0] for count in steps.counts().values())


def test_the_penalty_is_that_of_all_factors_once_a_step():
    """orthogonality x mean over factors of ||A A^T - I||_F and ||B^T B - I||_F, of used and reserved ranks."""
    plain, steps = Steps(**GROWS, orthogonality=0.0), Steps(**GROWS, orthogonality=0.3)
    plain.backward(0)
    factors = []
    for layer in plain.layers.values():
        factors += [layer.rank_lora_A["default"][:2], layer.rank_lora_B["default"][:, :2].T]
    penalty = sum((rows @ rows.T - torch.eye(2)).norm() for rows in factors) / len(factors)
    (0.3 * penalty).backward()
    steps.optimizer.step = lambda: None  # type: ignore[method-assign]
    steps.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    steps(0)
    for got, want in zip(steps.trained, plain.trained, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)
    assert steps.rule.metrics()["orthogonality"] == pytest.approx(float(penalty), rel=1e-5)


def test_nested_ranks_are_drawn_anew_and_are_all_there_between_steps():
    steps = Steps(r=6, variant="dylora", least_r=3)
    drawn = []
    for step in range(40):
        steps.rule.begin_step(StepContext(step=step, num_steps=40, num_micro_batches=1))
        (used,) = {int(layer.rank_lora_drawn["default"]) for layer in steps.layers.values()}
        drawn.append(used)
        steps.rule.after_optimizer(StepContext(step=step, num_steps=40, num_micro_batches=1, skipped=DONE))
        assert all(int(layer.rank_lora_drawn["default"]) == 6 for layer in steps.layers.values())
    assert set(drawn) == {3, 4, 5, 6}
    other = Steps(r=6, variant="dylora", least_r=3)
    other.rule.begin_step(StepContext(step=17, num_steps=40, num_micro_batches=1))
    assert int(next(iter(other.layers.values())).rank_lora_drawn["default"]) == drawn[17], "whatever came before"


def test_a_run_that_is_too_short_for_its_budget_is_refused():
    with pytest.raises(ConfigError, match=r"target_r=2.0 asks for 4 more ranks in 4 layers, and 3 steps give 2; lower"):
        Steps(**GROWS)(0, num_steps=3)
