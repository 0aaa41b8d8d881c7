"""N:M sparsity against Zhou et al. 2021, its schedule over micro-batches, and its errors."""

import pydantic
import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites, iter_sites
from leanmill.kernels.nm_mask.naive import nm_mask_by_sort
from leanmill.sparse.nm_sparsity.config import NMSparsity
from leanmill.sparse.nm_sparsity.stage import NMSparsityStage
from tests.core.tiny import context, install, loss_of, tiny, tokens


SHAPES = [(5, 12), (1, 4), (3, 6, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_straight_through_values_and_gradient(shape, dtype):
    weight = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    out = NMSparsityStage(2, 4)(weight)
    out.backward(upstream)
    assert out.dtype == dtype
    assert torch.equal(out, weight * nm_mask_by_sort(weight, 2, 4))
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_sr_ste_gradient_is_the_papers(shape, dtype):
    weight = torch.randn(shape).to(dtype).requires_grad_()
    upstream = torch.randn(shape).to(dtype)
    stage = NMSparsityStage(1, 4, 0.15)
    stage(weight).backward(upstream)
    pruned = ~nm_mask_by_sort(weight.detach(), 1, 4)
    expected = upstream.double() + 0.15 * pruned * weight.detach().double()
    torch.testing.assert_close(weight.grad.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps)
    kept = ~pruned
    assert torch.equal(weight.grad[kept], upstream[kept])


def test_the_mask_follows_the_weights():
    stage, weight = NMSparsityStage(1, 2), torch.tensor([[1.0, 2.0]])
    assert torch.equal(stage(weight), torch.tensor([[0.0, 2.0]]))
    weight[0, 0] = 3.0
    assert torch.equal(stage(weight), torch.tensor([[3.0, 0.0]]))
    assert not stage.state_dict()


def test_tied_weights_decay_once():
    decay, model = 0.5, tiny(tie_word_embeddings=True)
    install(model, {"type": "nm_sparsity", "decay": decay, "targets": ["embed_tokens", "lm_head"]})
    weight = model.get_input_embeddings().weight
    (loss_of(model, tokens()) * 0).backward()
    expected = decay * weight.detach() * ~nm_mask_by_sort(weight.detach(), 2, 4)
    torch.testing.assert_close(weight.grad, expected)


def test_straight_through_needs_no_rule():
    assert install(tiny(), {"type": "nm_sparsity", "gradient": "straight_through"}).step_rules == []
    assert install(tiny(), {"type": "nm_sparsity", "decay": 0.0}).step_rules == []


def test_reset_gives_the_buffer_its_value():
    stage = NMSparsityStage(2, 4, 1.0, device="meta").to_empty(device="cpu")
    stage.reset_parameters()
    assert stage.decay_left.tolist() == [1.0]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_every_group_of_every_target_keeps_n(family):
    model = tiny(family)
    install(model, {"type": "nm_sparsity", "num_kept": 3, "group_size": 8})
    num_sites = 0
    for name, site in iter_sites(model):
        nonzero = site.effective_weight().reshape(-1, 8).count_nonzero(dim=-1)
        assert (nonzero == 3).all(), name
        num_sites += 1
    assert num_sites >= 12


def test_a_group_size_that_does_not_divide_is_refused_before_anything_changes():
    model = tiny(intermediate_size=46)
    with pytest.raises(ConfigError, match=r"down_proj.*group_size 4 .*\[32, 46\].*exclude") as error:
        NMSparsity().install(Sites(model), context())
    assert "\n" not in str(error.value)
    assert not any(site.stages for _, site in iter_sites(model))
    NMSparsity(exclude=["down_proj"]).install(Sites(model), context())


@pytest.mark.parametrize("fields", [{"num_kept": 4}, {"num_kept": 0}, {"group_size": 65}, {"group_size": 1}])
def test_patterns_out_of_range_are_refused(fields):
    with pytest.raises(pydantic.ValidationError):
        NMSparsity(**fields)
