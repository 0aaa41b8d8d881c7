"""MaskLLM against Fang et al. 2024, its schedules, its start from a prior, and its errors."""

import itertools
import math

import pytest
import torch
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.noise import derive_seed, element_indices, gumbel
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import Sites, iter_sites
from leanmill.kernels.nm_mask.naive import nm_mask_by_sort
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.materialise import initialise_stages
from leanmill.sparse.mask_llm.product import masked
from leanmill.sparse.mask_llm.stage import DrawnMaskStage, MaskLlmStage, Schedule, all_masks
from tests.core.tiny import context, install, loss_of, tiny, tokens


SHAPES = [(5, 12), (1, 4), (3, 6, 8)]
PATTERNS = [(2, 4), (1, 4), (3, 4), (2, 8)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 2**-8}
SCHEDULE = Schedule((4.0, 0.05), (1e2, 5e2), 0.3)


def stage_of(weight, num_kept=2, group_size=4, schedule=SCHEDULE, kind=MaskLlmStage, **options):
    stage = kind("site", weight, num_kept, group_size, schedule, **options)
    torch.manual_seed(0)
    stage.reset_parameters()
    stage.noise.renew(3, 7)
    return stage


def papers(weight, logits, g, kappa, tau, num_kept, group_size):
    """Equations 3 to 6: candidates, Gumbel-softmax, the weighted sum of candidates, and its product."""
    candidates = torch.zeros(math.comb(group_size, num_kept), group_size, dtype=torch.float64)
    for row, kept in enumerate(itertools.combinations(range(group_size), num_kept)):
        candidates[row, list(kept)] = 1
    exponentials = torch.exp((kappa * logits.double() + g.double()) / tau)
    y = exponentials / exponentials.sum(-1, keepdim=True)
    mask = torch.einsum("...gk,km->...gm", y, candidates).reshape(weight.shape)
    return weight.double() * mask, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 24), (1, 8), (3, 6, 8)])
@pytest.mark.parametrize(("num_kept", "group_size"), PATTERNS)
def test_value_and_gradients_are_the_papers(num_kept, group_size, shape, dtype):
    torch.manual_seed(1)
    weight, upstream = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight.requires_grad_()
    stage = stage_of(weight, num_kept, group_size)
    stage.set_progress(0.25)
    out = stage(weight)
    out.backward(upstream)
    # The schedule after a quarter of the run.
    tau, kappa, strength = 4 + (0.05 - 4) / 4, 100 + 400 / 4, 0.3 * 3 / 4
    g = gumbel(torch.tensor([derive_seed(3, "mask_llm/site", 7)]), element_indices(stage.logits))
    logits = stage.logits.detach().double().requires_grad_()
    expected, mask = papers(weight.detach(), logits, g, kappa, tau, num_kept, group_size)
    loss = (expected * upstream.double()).sum() - strength * (weight.detach().double() * mask).square().sum()
    loss.backward()
    assert out.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        weight.grad.double(), upstream.double() * mask.detach(), rtol=tolerance, atol=2 * tolerance
    )
    # Logits train in fp32 whatever the weight is.
    error = (stage.logits.grad.double() - logits.grad).abs().max() / logits.grad.abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 1e-4)


def test_the_regulariser_counts_once_a_step():
    weight = torch.randn(4, 8, dtype=torch.float64)
    stage, off = stage_of(weight), stage_of(weight, schedule=Schedule((4.0, 0.05), (1e2, 5e2), 0.0))
    upstreams = torch.randn(3, 4, 8, dtype=torch.float64)
    for part in (stage, off):
        for upstream in upstreams:
            part(weight).backward(upstream)
    mask = stage.soft_mask()
    (pull,) = torch.autograd.grad(-0.3 * (weight * mask).square().sum(), stage.logits)
    torch.testing.assert_close(stage.logits.grad - off.logits.grad, pull)
    assert pull.abs().max() > 1e-3


def test_gradients_of_the_product():
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w, m: masked(w, m, zero), (weight, mask))


def drawn(weight, logits, g, kappa, tau, num_kept, group_size):
    """Xie and Ermon's relaxation of N draws, group by group in fp64."""
    scores = (kappa * logits.double() + g.double()).reshape(-1, group_size)
    total = torch.zeros_like(scores)
    for _ in range(num_kept):
        exponentials = torch.exp(scores / tau)
        draw = exponentials / exponentials.sum(-1, keepdim=True)
        total, scores = total + draw, scores + torch.log(1 - draw)
    mask = total.reshape(weight.shape)
    return weight.double() * mask, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("num_kept", "group_size"), [(1, 2), (2, 4), (4, 8), (3, 24)])
def test_draws_are_the_papers(num_kept, group_size, dtype):
    torch.manual_seed(1)
    weight, upstream = torch.randn(5, 24).to(dtype).requires_grad_(), torch.randn(5, 24).to(dtype)
    stage = stage_of(weight, num_kept, group_size, kind=DrawnMaskStage)
    stage.set_progress(0.25)
    out = stage(weight)
    out.backward(upstream)
    tau, kappa, strength = 4 + (0.05 - 4) / 4, 100 + 400 / 4, 0.3 * 3 / 4
    assert stage.logits.shape == weight.shape
    g = gumbel(torch.tensor([derive_seed(3, "mask_llm/site", 7)]), element_indices(stage.logits))
    logits = stage.logits.detach().double().requires_grad_()
    expected, mask = drawn(weight.detach(), logits, g, kappa, tau, num_kept, group_size)
    loss = (expected * upstream.double()).sum() - strength * (weight.detach().double() * mask).square().sum()
    loss.backward()
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected.detach(), rtol=tolerance, atol=tolerance)
    error = (stage.logits.grad.double() - logits.grad).abs().max() / logits.grad.abs().max()
    assert error < (1e-12 if dtype == torch.float64 else 1e-4)


def test_draws_that_are_sure():
    """At the end of a run, with logits far apart, soft draws are the N largest scores, and gradients are finite."""
    stage = stage_of(torch.randn(8, 64), 4, 8, kind=DrawnMaskStage)
    with torch.no_grad():
        stage.logits.normal_(std=3.0)
    stage.set_progress(1.0)
    mask = stage.soft_mask()
    torch.testing.assert_close(mask.unflatten(-1, (-1, 8)).sum(-1), torch.full((8, 8), 4.0))
    best = stage._scores().unflatten(-1, (-1, 8)).topk(4).indices
    hard = torch.zeros(8, 8, 8).scatter_(-1, best, 1.0).flatten(-2)
    assert ((mask - hard).abs() < 0.01).float().mean() > 0.99
    mask.square().sum().backward()
    assert stage.logits.grad.isfinite().all()
    out = stage.eval()(torch.ones(8, 64))
    assert (out.unflatten(-1, (-1, 8)).sum(-1) == 4).all()
    assert stage.pattern() == (4, 8)


def test_draws_start_from_a_prior():
    weight = torch.randn(16, 64)
    stage = stage_of(weight, 8, 16, prior=lambda w: nm_mask_by_sort(w, 8, 16), prior_strength=3.0, kind=DrawnMaskStage)
    before, prior = stage.logits.detach().clone(), nm_mask_by_sort(weight, 8, 16)
    stage.initialise(weight)
    torch.testing.assert_close(stage.logits.detach(), before + 3.0 * before.std() * (prior.float() - 0.5))
    stage.prior_strength = 1000.0
    stage.initialise(weight)
    assert torch.equal(stage.mask(), prior)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_likeliest_candidate_in_evaluation(shape):
    weight = torch.randn(shape)
    stage = stage_of(weight)
    assert stage.pattern() is None, "a soft mask keeps all"
    assert stage.eval().pattern() == (2, 4)
    out = stage(weight)
    kept = out.reshape(-1, 4) != 0
    assert (kept.sum(-1) == 2).all()
    best = all_masks(2, 4)[stage.logits.argmax(-1).flatten()]
    assert torch.equal(kept, best)
    assert torch.equal(out.reshape(-1, 4)[kept], weight.reshape(-1, 4)[kept])


def test_sampling_is_soft_at_first_and_hard_at_the_end():
    stage = stage_of(torch.randn(64, 64))
    soft, share = stage.soft_mask().detach(), {}
    for progress in (0.0, 1.0):
        stage.set_progress(progress)
        mask = stage.soft_mask().detach()
        torch.testing.assert_close(mask.reshape(-1, 4).sum(-1), torch.full((1024,), 2.0))
        share[progress] = ((mask < 0.01) | (mask > 0.99)).float().mean()
    assert share[0.0] < 0.05
    assert share[1.0] > 0.95
    stage.noise.renew(3, 8)
    stage.set_progress(0.0)
    assert not torch.equal(stage.soft_mask(), soft)


def test_with_a_strong_prior_the_mask_is_the_prior():
    weight = torch.randn(16, 32)
    prior = nm_mask_by_sort(weight, 2, 4)
    stage = stage_of(weight, prior=lambda w: nm_mask_by_sort(w, 2, 4), prior_strength=3.0)
    before = stage.logits.detach().clone()
    stage.initialise(weight)
    groups, candidates = prior.reshape(16, 8, 1, 4), all_masks(2, 4)
    in_common = (groups & candidates).sum(-1)
    torch.testing.assert_close(stage.logits.detach(), before + 3.0 * before.std() * (in_common - 1))
    stage.prior_strength = 1000.0
    stage.initialise(weight)
    assert torch.equal(stage.mask(), prior)


def test_only_logits_are_trained_and_weights_share_their_rows():
    model = tiny()
    install(model, {"type": "mask_llm"})
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert trained.pop("model.layers.0.mlp.down_proj.stages.mask.logits") == (32, 12, 6)
    assert all(name.endswith("mask.logits") for name in trained)
    assert len(trained) == 13


def test_rules_write_the_step():
    model = tiny()
    installation = parse_technique({"type": "mask_llm"}).install(Sites(model), context(seed=5))
    assert installation.freeze_base
    stages = {name: site.stages["mask"] for name, site in iter_sites(model)}
    for step in (0, 3):
        for rule in installation.step_rules:
            rule.begin_step(StepContext(step=step, num_steps=4, num_micro_batches=1))
        for name, stage in stages.items():
            assert stage.noise.key.item() == derive_seed(5, f"mask_llm/{name}", step)
            assert stage.temperature.item() == pytest.approx(4 - 3.95 * step / 4)
            assert stage.scale.item() == pytest.approx(100 + 400 * step / 4)
            assert stage.pull_left.item() == pytest.approx(1e-5 * (1 - step / 4))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_quantiser_starts_from_the_likeliest_mask(family):
    model = tiny(family)
    install(model, {"type": "mask_llm", "prior_strength": 100.0}, {"type": "lsq", "granularity": "row"})
    for _, site in iter_sites(model):
        site.stages["mask"].reset_parameters()
    initialise_stages(model)
    for name, site in iter_sites(model):
        kept = site.raw_weight.detach() * nm_mask_by_sort(site.raw_weight.detach(), 2, 4)
        expected = 2 * kept.abs().mean(-1, keepdim=True) / 7**0.5
        torch.testing.assert_close(site.stages["quant"].scale.detach(), expected, msg=name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kept": 4}, "num_kept must be 1 to 3"),
        ({"num_kept": 8, "group_size": 16}, "12870 ways .* set sampler: draws"),
        ({"temperature": [4.0, 0.0]}, "temperature"),
        ({"prior": "pruned"}, "prior_model: FOLDER together"),
        ({"prior_model": "x"}, "prior: pruned"),
    ],
)
def test_requests_that_do_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_technique({"type": "mask_llm", **fields})


def test_installations_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"mask_llm draws random numbers and was given no seed; set `seed: 0`"):
        parse_technique({"type": "mask_llm"}).install(Sites(tiny()), context(seed=None))
    with pytest.raises(ConfigError, match=r"down_proj.*group_size 4.*mask_llm\.exclude"):
        install(tiny(intermediate_size=46), {"type": "mask_llm"})
    with pytest.raises(ConfigError, match="MASK slot is taken by 'mask_llm', so 'nm_sparsity'"):
        install(tiny(), {"type": "mask_llm"}, {"type": "nm_sparsity"})


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_the_gradient_is_the_same_and_the_regulariser_counts_once(backend):
    model = nn.Sequential(nn.Linear(16, 12, bias=False), nn.ReLU())
    parse_technique({"type": "mask_llm", "weight_regularisation": 0.1}).install(Sites(model), context())
    model[0].weight.requires_grad_(False)
    stage, inputs = model[0].stages["mask"], torch.randn(3, 16)
    stage.reset_parameters()
    stage.noise.renew(0, 0)

    def gradient(function):
        stage.logits.grad = None
        stage.set_progress(0.5)
        for _ in range(2):
            function(inputs).square().sum().backward()
        assert stage.pull_left.item() == 0
        return stage.logits.grad.clone()

    torch.testing.assert_close(gradient(torch.compile(model, fullgraph=True, backend=backend)), gradient(model))


def test_recomputed_blocks_train_the_same():
    found = []
    for mode in ("none", "full"):
        model, ids = tiny(), tokens()
        rules = install(model, {"type": "mask_llm", "weight_regularisation": 0.1}).step_rules
        for number, (_, site) in enumerate(iter_sites(model)):
            torch.manual_seed(number)
            site.stages["mask"].reset_parameters()
        apply_activation_checkpointing(model, mode)
        for rule in rules:
            rule.begin_step(StepContext(step=1, num_steps=4, num_micro_batches=2))
        for _ in range(2):
            loss_of(model, ids).backward()
        assert all(site.stages["mask"].pull_left == 0 for _, site in iter_sites(model))
        found.append({clean_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(found[0]) == 14
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")
