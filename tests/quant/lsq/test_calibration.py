"""Where steps and offsets of LSQ+ start, and the gradients of a trained offset."""

import pytest
import torch

from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.models.materialise import initialise_stages
from leanmill.quant.grids import UniformGrid
from leanmill.quant.lsq.activations import LsqActivations
from leanmill.quant.lsq.calibration import NUM_BINS, CalibrateSteps, _Histogram, least_error
from leanmill.quant.lsq.stage import three_sigma_start
from leanmill.quant.sharing import Sharing
from tests.core.tiny import install, tiny, tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_bits", "grid", "low", "high"), [(4, "signed", -8, 7), (3, "unsigned", 0, 7)])
def test_value_and_gradients_are_the_papers(num_bits, grid, low, high, dtype):
    torch.manual_seed(0)
    x, upstream = torch.randn(7, 12).to(dtype).requires_grad_(), torch.randn(7, 12).to(dtype)
    stage = LsqActivations(12, num_bits, grid, has_offset=True)
    stage.begin_at(0.15, -0.5)
    with torch.no_grad():
        stage.moved.fill_(0.05)
        stage.moved_offset.fill_(0.1)
    out = stage(x)
    out.backward(upstream)
    # Bhalgat et al. 2020, eq. 3 to 6: clip((x - beta) / s) s + beta.
    s, beta = (
        (stage.initial + stage.moved).detach().double(),
        (stage.initial_offset + stage.moved_offset).detach().double(),
    )
    u = (x.detach().double() - beta) / s
    code = u.clamp(low, high).round()
    inside = (u >= low) & (u <= high)
    g, grad = (12 * high) ** -0.5, upstream.double()
    torch.testing.assert_close(out.double(), code * s + beta, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(x.grad, upstream * inside)
    to_step = (torch.where(inside, code - u, code) * grad).sum() * g
    torch.testing.assert_close(stage.moved.grad.double(), to_step.reshape(1), rtol=1e-4, atol=1e-5)
    to_offset = (grad * ~inside).sum() * g
    torch.testing.assert_close(stage.moved_offset.grad.double(), to_offset.reshape(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 3.0])
@pytest.mark.parametrize("num_bits", [2, 4])
def test_the_start_has_the_least_error_of_grids_that_were_tried(num_bits, shift):
    values = torch.nn.functional.silu(torch.randn(4000, generator=torch.Generator().manual_seed(0))) + shift
    low, high = values.min().item(), values.max().item()
    grid = UniformGrid(num_bits, "signed")
    step, offset = least_error(torch.histc(values, NUM_BINS, low, high).double(), low, high, grid)

    def error(step, offset):
        codes = ((values - offset) / step).round().clamp(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)
        return (codes * step + offset - values).square().mean().item()

    ends = (high - low) / (2**num_bits - 1)
    assert error(step, offset) <= error(ends, low + 2 ** (num_bits - 1) * ends), "the extremes are among those"
    assert error(step, offset) < 0.9 * error(2 * values.abs().mean() / max(2 ** (num_bits - 1) - 1, 1) ** 0.5, 0.0)


def test_one_value_is_a_level_and_no_histogram_is_needed():
    step, offset = least_error(torch.zeros(NUM_BINS), 2.5, 2.5, UniformGrid(4))
    stage = LsqActivations(3, 4, has_offset=True)
    stage.begin_at(step, offset)
    assert torch.equal(stage(torch.full((2, 3), 2.5)), torch.full((2, 3), 2.5))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group"])
def test_weights_start_at_three_deviations(granularity):
    weight = torch.randn(6, 8) + 0.3
    sharing = Sharing(granularity, 4 if granularity == "group" else None)
    got = three_sigma_start(weight, 3, sharing)
    pieces = {"tensor": weight.reshape(1, -1), "row": weight, "group": weight.reshape(12, 4)}[granularity].double()
    mean, deviation = pieces.mean(-1), pieces.std(-1, correction=0)
    expected = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 4
    torch.testing.assert_close(got.flatten(), expected)


def test_a_model_starts_from_its_first_batch_whatever_the_micro_batches():
    starts = []
    for parts in (1, 2):
        model = tiny()
        raw = {"type": "lsq", "activation_bits": 4, "activation_offset": True, "weight_start": "lsq_plus"}
        (rule,) = install(model, raw).step_rules
        initialise_stages(model)
        assert isinstance(rule, CalibrateSteps)
        batches = [{"input_ids": part} for part in tokens(4).chunk(parts)]

        def score(batch, model=model):
            with torch.no_grad():
                return model(**batch).logits[..., 0]

        rule.change_batches(batches, StepContext(step=0, num_steps=1, num_micro_batches=parts), score)
        stages = [site.inputs["quant"] for _, site in iter_sites(model)]
        starts.append(torch.stack([torch.cat([stage.initial, stage.initial_offset]) for stage in stages]))
        assert all(stage.watch is None for stage in stages)
        assert (starts[-1][:, 0] > 0).all()
    torch.testing.assert_close(starts[0], starts[1], rtol=1e-4, atol=1e-5)


def test_an_offset_needs_activations():
    with pytest.raises(ValueError, match=r"set activation_bits too"):
        parse_technique({"type": "lsq", "activation_offset": True})


def test_a_bin_counts_past_what_fp32_adds_one_to():
    histogram = _Histogram(-1.0, 1.0, torch.device("cpu"))
    histogram(torch.zeros(1, dtype=torch.bfloat16).expand((1 << 24) + 5))
    assert histogram.counts.max() == histogram.counts.sum() == (1 << 24) + 5
