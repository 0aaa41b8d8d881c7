"""The Triton pass over two chunks of logits: interpreted here, compiled on a GPU."""

import pytest
import torch

from leanmill.kernels.linear_kl.naive import Form
from tests.kernels.compiled import assert_compiles
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module
from tests.kernels.linear_kl.rows import PEAKS, assert_equals_definition, logits, peaked, top_k_oracle


kernel = kernel_module("linear_kl")
FORMS = [
    Form("forward"),
    Form("forward", 0.5, 2.0, 0.4, 0.6),
    Form("reverse", 0.5, 0.7, 1.0, 0.5),
    Form("js", 0.3),
    Form("js", 0.5, 2.0, 1.5, 0.0),
    Form("skew_forward", 0.1, 2.0, 1.0, 0.5),
    Form("skew_reverse", 0.1),
    Form("total_variation", 0.5, 2.0),
    Form("blend", 0.3),
    Form("mse", 0.5, 2.0, 0.7, 0.3),
]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # So that a few hundred columns are several blocks.
    monkeypatch.setattr(kernel, "block_size", lambda width: 128)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "teacher_width"), [(1, 1), (200, 300), (300, 140)])
def test_equals_the_definition(width, teacher_width, dtype, form):
    labels = torch.tensor([0, -1, width - 1], device=DEVICE)
    raw = logits(3, width, dtype, 0, DEVICE)
    teacher = logits(3, teacher_width, dtype, 1, DEVICE)
    assert_equals_definition(kernel.divergence_, raw, teacher, labels, form)


@pytest.mark.parametrize("form", [Form("forward"), Form("reverse", 0.5, 2.0), Form("js", 0.5), Form("js", 0.999)])
@pytest.mark.parametrize("peak", PEAKS)
def test_a_peaked_teacher(peak, form):
    raw, teacher = logits(3, 300, device=DEVICE), peaked(3, 300, peak).to(DEVICE)
    exact = raw.double().requires_grad_()
    expected = top_k_oracle(exact, teacher, 300, form)
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    labels = torch.zeros(3, dtype=torch.long, device=DEVICE)
    got, _ = kernel.divergence_(raw, teacher, labels, form, wants_gradient=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(raw.double(), gradient, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("who", ["student", "both"])
def test_tokens_that_the_student_rules_out(who):
    raw, teacher = logits(2, 300, device=DEVICE), logits(2, 300, seed=1, device=DEVICE)
    raw[:, 100:250] = -torch.inf
    if who == "both":
        teacher[:, 100:250] = -torch.inf
    assert_equals_definition(kernel.divergence_, raw, teacher, torch.tensor([3, 260], device=DEVICE), Form("js", 0.3))


@pytest.mark.parametrize("kind", ["forward", "js"])
def test_tokens_that_the_teacher_rules_out(kind):
    raw, teacher = logits(2, 300, device=DEVICE), logits(2, 300, seed=1, device=DEVICE)
    teacher[:, 100:250] = -torch.inf
    assert_equals_definition(kernel.divergence_, raw, teacher, torch.tensor([3, 260], device=DEVICE), Form(kind))


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_nan_shows_in_its_row_only(kind, who):
    raw, teacher = logits(2, 300, device=DEVICE), logits(2, 300, seed=1, device=DEVICE)
    (raw if who == "student" else teacher)[1, 200] = torch.nan
    labels = torch.tensor([1, 1], device=DEVICE)
    found = kernel.divergence_(raw, teacher, labels, Form(kind), wants_gradient=True)
    assert found[0].isnan().tolist() == [False, True]
    assert raw[0].isfinite().all()


def test_no_rows():
    empty = torch.empty(0, 5, device=DEVICE)
    labels = torch.empty(0, dtype=torch.long, device=DEVICE)
    assert kernel.divergence_(empty, empty, labels, Form("js"), wants_gradient=True)[0].shape == (0,)


def test_compiles_for_a_gpu():
    types = dict.fromkeys(["width", "teacher_width", "shared"], "i32")
    types |= {"raw_ptr": "*bf16", "teacher_ptr": "*bf16", "labels_ptr": "*i64"}
    types |= {"divergences_ptr": "*fp32", "cross_entropies_ptr": "*fp32", "inverse": "fp32", "temperature": "fp32"}
    types |= dict.fromkeys(["beta", "log_share", "log_rest", "divergence_weight", "cross_entropy_weight"], "fp32")
    variants = [
        {"KIND": kind, "WANTS_CROSS_ENTROPY": kind > 0, "WANTS_GRADIENT": True, "BLOCK": 4096} for kind in (0, 4, 7)
    ]
    assert_compiles("leanmill.kernels.linear_kl.kernel", "_divergence_rows", types, variants)
