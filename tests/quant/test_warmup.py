"""From full precision to rounded operands: the blog's formula, exact ends, and what a run does with it."""

import pytest
import torch

from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.models.materialise import initialise_stages
from leanmill.quant.int_quant.stage import IntActivations
from leanmill.quant.lsq.stage import LsqStage
from leanmill.quant.ternary.stage import TernaryStage
from leanmill.recipe.root import Recipe
from tests.contract_training import recipe_of
from tests.core.tiny import install, tiny


def context(step, num_steps=10):
    return StepContext(step=step, num_steps=num_steps, num_micro_batches=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.0, 0.25, 0.75, 1.0])
def test_values_lie_between_and_gradients_pass(strength, dtype):
    x, upstream = torch.randn(5, 7).to(dtype).requires_grad_(), torch.randn(5, 7).to(dtype)
    for stage in (TernaryStage("absmean", "row", has_warmup=True), IntActivations(4, has_warmup=True)):
        stage.strength.fill_(strength)
        full = stage.rounded(x).detach()
        out = stage(x)
        x.grad = None
        out.backward(upstream)
        # x_quant = x + lambda_ * (quant(x) - x).detach()
        expected = x.detach().double() + strength * (full.double() - x.detach().double())
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.double(), expected, rtol=2 * eps, atol=2 * eps)
        torch.testing.assert_close(x.grad, upstream, rtol=2 * eps, atol=0)
        if strength in (0.0, 1.0):
            assert torch.equal(out, full if strength else x), "both ends are exact"


def test_learned_scales_get_their_share_of_the_gradient():
    weight = torch.randn(4, 6, requires_grad=True)
    found = {}
    for strength in (0.5, 1.0):
        stage = LsqStage(weight, 3, has_warmup=True)
        stage.initialise(weight.detach())
        stage.strength.fill_(strength)
        weight.grad = None
        stage(weight).square().sum().backward(torch.ones(()))
        found[strength] = stage
        assert stage.learned_grid() is None
    inside = weight.detach().abs() < 2 * found[1.0].scale.detach()
    assert torch.isfinite(weight.grad).all()
    assert inside.any()
    weight.grad = None
    stage = found[0.5]
    stage.scale.grad = None
    stage(weight).sum().backward()
    half = stage.scale.grad.clone()
    full = found[1.0]
    full.scale.grad = None
    full(weight).sum().backward()
    torch.testing.assert_close(half, full.scale.grad / 2)


@pytest.mark.parametrize(("warmup", "strengths"), [(4, [0, 0.25, 0.5, 0.75, 1, 1]), (0.2, [0, 0.5, 1, 1, 1, 1])])
@pytest.mark.parametrize("kind", ["ternary", "int_quant", "binary"])
def test_a_rule_raises_weights_and_activations_of_its_technique(kind, warmup, strengths):
    model = tiny()
    installed = install(
        model,
        {"type": kind, "activation_bits": 8, "warmup_steps": warmup, "targets": ["q_proj"]},
        {"type": "lsq", "warmup_steps": 9, "targets": ["k_proj"]},
    )
    rules = {rule.name: rule for rule in installed.step_rules}
    rule = rules[f"{kind}_warmup"]
    for step, strength in enumerate(strengths):
        rule.begin_step(context(step))
        assert rule.metrics() == {"strength": strength}
        for name, site in iter_sites(model):
            stages = [*site.weight_stages(), *site.input_stages()]
            expected = strength if name.endswith("q_proj") else 0.0
            assert all(float(stage.strength) == expected for stage in stages), name


def test_codes_and_packing_wait_for_the_end():
    weight = torch.randn(4, 8)
    stage = TernaryStage(has_warmup=True)
    assert stage.packing(weight.shape) is None
    stage.strength.fill_(0.99)
    assert stage.codes(weight) is None
    stage.strength.fill_(1.0)
    assert stage.codes(weight) is not None


def test_without_a_warmup_there_is_no_buffer():
    model = tiny()
    install(model, {"type": "ternary", "activation_bits": 8}, {"type": "nm_sparsity"})
    initialise_stages(model)
    assert not any("strength" in name for name in model.state_dict())


def test_a_share_that_rounds_to_nothing_is_one_step():
    (rule,) = install(tiny(), {"type": "ternary", "warmup_steps": 0.1}).step_rules
    for step, strength in enumerate((0.0, 1.0)):
        rule.begin_step(context(step, num_steps=2))
        assert rule.metrics() == {"strength": strength}
    config = parse_technique({"type": "ternary", "warmup_steps": 0.1})
    assert not list(config.problems_in_a_run_of(2))
    (problem,) = config.problems_in_a_run_of(1)
    assert "is not over before the last of 1 steps" in problem
    assert problem.endswith("leave ternary.warmup_steps out")
    assert not list(parse_technique({"type": "ternary", "warmup_steps": 0.0}).problems_in_a_run_of(1))


@pytest.mark.parametrize(
    ("warmup", "message"),
    [(3, "is not over before the last of 3 steps"), (1.5, r"type warmup_steps: 2"), (-1, "greater than or equal to 0")],
)
def test_a_warmup_that_does_not_end_is_refused(warmup, message):
    raw = recipe_of((), {"type": "single"}, "", 1).model_dump(mode="json")
    raw["techniques"] = [{"type": "ternary", "warmup_steps": warmup}]
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(raw)
