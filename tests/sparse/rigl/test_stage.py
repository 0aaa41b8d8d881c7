"""The moving mask: exact counts at the start, zeros in forward, the dense gradient in backward."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.site import LinearSite
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.stage import Slot
from leanmill.models.materialise import draw
from leanmill.recipe.root import Recipe
from leanmill.sparse.rigl.stage import MovingMask
from tests.core.tiny import context, install, tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype):
    site = LinearSite.adopt(torch.nn.Linear(5, 7).to(dtype), "layer")
    stage = MovingMask((7, 5), 12)
    stage.reset_parameters()
    site.put(stage)
    assert int(stage.mask.sum()) == 12
    tokens = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    out = site(tokens)
    grad = torch.randn_like(out)
    out.backward(grad)
    twin = tokens.detach().clone().requires_grad_()
    masked = torch.where(stage.mask, site.weight.detach(), torch.zeros((), dtype=dtype)).requires_grad_()
    F.linear(twin, masked, site.bias.detach()).backward(grad)
    assert torch.equal(out.detach(), F.linear(twin, masked, site.bias).detach())
    assert torch.equal(tokens.grad, twin.grad)
    # Straight through: also where the mask is off, which is what growth looks at.
    torch.testing.assert_close(site.weight.grad, masked.grad)
    assert (site.weight.grad[~stage.mask] != 0).all()
    assert (site.effective_weight()[~stage.mask] == 0).all()


def test_first_masks():
    torch.manual_seed(4)
    stage = MovingMask((40, 30), 300)
    stage.reset_parameters()
    assert int(stage.mask.sum()) == 300
    assert not stage.has_initialiser
    weight = torch.randn(40, 30)
    largest = MovingMask((40, 30), 300, "magnitude")
    assert largest.has_initialiser
    largest.initialise(weight)
    assert int(largest.mask.sum()) == 300
    assert weight.abs()[largest.mask].min() >= weight.abs()[~largest.mask].max()


def _masks(model):
    return {name: site.stage(Slot.MASK) for name, site in iter_sites(model)}


def test_installed_masks_have_the_counts_asked_for():
    model = tiny("qwen3_moe")
    rules = install(model, {"type": "rigl", "density": 0.2}).step_rules
    draw(model, seed=0)
    masks = _masks(model)
    total = sum(stage.mask.numel() for stage in masks.values())
    assert sum(int(stage.mask.sum()) for stage in masks.values()) == pytest.approx(0.2 * total, abs=len(masks))
    experts = [stage.mask for stage in masks.values() if stage.mask.dim() == 3]
    assert len(experts) == 4, "whole stacks of experts, one count each"
    assert all(int(stage.mask.sum()) == stage.num_active for stage in masks.values())
    assert [rule.name for rule in rules] == ["rigl"]
    drawn = {name: stage.mask.clone() for name, stage in masks.items()}
    draw(model, seed=0)
    assert all(torch.equal(stage.mask, drawn[name]) for name, stage in masks.items())
    draw(model, seed=1)
    assert not any(
        torch.equal(stage.mask, drawn[name]) for name, stage in masks.items() if 0 < stage.mask.float().mean() < 1
    )


def test_tied_weights_share_a_mask_and_count_once():
    model = tiny(tie_word_embeddings=True)
    options = {"density": 0.25, "distribution": "uniform", "start": "magnitude"}
    install(model, {"type": "rigl", "targets": ["embed_tokens", "lm_head", "up_proj"], **options})
    draw(model, seed=0)
    masks = _masks(model)
    assert masks["model.embed_tokens"] is masks["lm_head"]
    assert masks["lm_head"].num_active == round(0.25 * 61 * 32)
    weight = model.lm_head.weight.detach().abs()
    assert weight[masks["lm_head"].mask].min() >= weight[~masks["lm_head"].mask].max()


@pytest.mark.parametrize(
    ("techniques", "message"),
    [
        ([{"type": "rigl", "density": 0.0001}], "leaves none of the weights of .*; raise it, or add"),
        ([{"type": "rigl"}, {"type": "lora", "rank": 2}], "rigl moves .*, but another technique freezes it"),
        ([{"type": "rigl"}, {"type": "quest"}], "which 'quest' changes before the mask; remove one"),
        ([{"type": "rigl"}, {"type": "nm_sparsity"}], "the MASK slot is taken by"),
    ],
)
def test_refusals(techniques, message):
    with pytest.raises(ConfigError, match=message):
        install(tiny(), *techniques)


def test_set_needs_a_seed():
    with pytest.raises(ConfigError, match="method=set grows at random and was given no seed; set `seed: 0`"):
        parse_technique({"type": "rigl", "method": "set"}).install(Sites(tiny()), context(seed=None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer": {"type": "adamw8bit"}},
            "rigl writes optimizer state element by element.*set optimizer.type=adamw",
        ),
        (
            {"engine": {"type": "deepspeed", "stage": 3, "offload_optimizer": {"device": "nvme", "path": "/nowhere"}}},
            "rigl reads weights and optimizer state in every step.*set engine.offload_optimizer.device=cpu",
        ),
    ],
)
def test_recipes_that_keep_state_out_of_reach(changes, message):
    recipe = {
        "model": {"config": {"model_type": "llama"}},
        "batch": {"tokens_per_step": 512, "tokens_per_micro_batch": 512},
        "train": {"steps": 2},
        "data": {"sequence_length": 512},
    }
    Recipe.model_validate({**recipe, **changes})
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**recipe, "techniques": [{"type": "rigl"}], **changes})
