"""The Triton pass over logits against the definition: interpreted here, compiled on a GPU."""

import pytest
import torch

from leanmill.kernels.linear_cross_entropy.naive import Form
from tests.kernels.compiled import assert_compiles
from tests.kernels.launcher import DEVICE, DTYPES, kernel_module
from tests.kernels.linear_cross_entropy.rows import assert_equals_definition


kernel = kernel_module("linear_cross_entropy")
FORMS = [Form(), Form(scale=-0.5, softcap=3.0), Form(1.5, 0.0, 0.01, 0.1)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    # So that a few hundred columns are several blocks.
    monkeypatch.setattr(kernel, "block_size", lambda width: 128)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 128, 300])
def test_equals_the_definition(width, dtype, form):
    generator = torch.Generator().manual_seed(width)
    raw = (torch.randn(3, width, generator=generator) * 4).to(DEVICE, dtype)
    labels = torch.tensor([0, -1, width - 1], device=DEVICE)
    scales = torch.randn(3, generator=generator).to(DEVICE)
    assert_equals_definition(kernel.cross_entropy_, raw, labels, None if form == FORMS[0] else scales, form)


def test_masked_columns_and_nan():
    raw = torch.randn(4, 300, device=DEVICE)
    raw[0, 100:] = -torch.inf
    raw[1, :200] = -torch.inf
    raw[2, 250] = torch.nan
    labels = torch.tensor([3, 260, 1, -1], device=DEVICE)
    rows = [0, 1, 3]
    assert_equals_definition(kernel.cross_entropy_, raw[rows], labels[rows], None, Form())
    losses = kernel.cross_entropy_(raw, labels, None, Form(), wants_gradient=True)
    assert losses[2].isnan()
    assert raw[2].isnan().any()


def test_a_label_past_the_vocabulary_is_nan_and_reads_nothing():
    raw = torch.randn(1, 5, device=DEVICE)
    assert kernel.cross_entropy_(raw, torch.tensor([5], device=DEVICE), None, Form(), wants_gradient=False).isnan()


def test_no_rows():
    empty = torch.empty(0, 5, device=DEVICE)
    labels = torch.empty(0, dtype=torch.long, device=DEVICE)
    assert kernel.cross_entropy_(empty, labels, None, Form(), wants_gradient=True).shape == (0,)


def test_compiles_for_a_gpu():
    types = dict.fromkeys(["width"], "i32") | dict.fromkeys(["factor", "cap", "z_loss", "smoothing"], "fp32")
    types |= {"raw_ptr": "*bf16", "labels_ptr": "*i64", "scales_ptr": "*fp32", "losses_ptr": "*fp32"}
    variants = [{"HAS_SCALES": flag, "HAS_CAP": flag, "WANTS_GRADIENT": True, "BLOCK": 4096} for flag in (False, True)]
    assert_compiles("leanmill.kernels.linear_cross_entropy.kernel", "_cross_entropy_rows", types, variants)
