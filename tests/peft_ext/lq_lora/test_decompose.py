"""Alternating decomposition beside the paper's algorithm written out."""

from functools import partial

import pytest
import torch

from leanmill.core.compact import BLOCK, Compact
from leanmill.core.normal_float import normal_float_levels
from leanmill.peft_ext.lq_lora.decompose import decompose, leading, rounded


def draw(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    rows, columns = torch.rand(shape[0], 1, generator=generator), torch.rand(1, shape[1], generator=generator)
    return weight, (rows * columns) ** 2 * torch.rand(shape, generator=generator)


def nearest(matrix, bits, dtype):
    """NormalFloat, an element at a time."""
    levels, out = normal_float_levels(bits), torch.zeros_like(matrix)
    for row in range(matrix.shape[0]):
        for first in range(0, matrix.shape[1], BLOCK):
            block = matrix[row, first : first + BLOCK]
            largest = block.abs().max().to(dtype)
            largest = float(largest.bfloat16() if bits < 4 else largest)
            for place, value in enumerate(block.tolist()):
                out[row, first + place] = largest * min(levels, key=lambda level: abs(level - value / largest))
    return out


def algorithm(weight, fisher, rank, bits, dtype, turns):
    """Returns Q and L1 L2 of each turn, and their errors."""
    rows = fisher.mean(1).sqrt().diag().double()
    columns = fisher.mean(0).sqrt().diag().double()
    kept, found = torch.zeros_like(weight), []
    for _ in range(turns):
        u, s, vt = torch.linalg.svd(rows @ (weight - kept).double() @ columns, full_matrices=False)
        left = torch.linalg.inv(rows) @ u[:, :rank] @ s[:rank].sqrt().diag()
        right = s[:rank].sqrt().diag() @ vt[:rank] @ torch.linalg.inv(columns)
        delta = (left @ right).float()
        kept = nearest(weight - delta, bits, dtype)
        found.append((kept, delta, float((fisher * (weight - delta - kept).square()).sum())))
    return found


@pytest.mark.parametrize(("shape", "bits"), [((9, 70), 2), ((13, 5), 3), ((8, 64), 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_weighted", [True, False])
def test_parts_are_those_of_the_algorithm(shape, bits, dtype, is_weighted):
    weight, fisher = draw(shape)
    rounding = partial(rounded, kind=f"nf{bits}", dtype=dtype)
    parts = decompose(weight, 3, rounding, sensitivity=fisher if is_weighted else None, iterations=4, generator=None)
    turns = algorithm(weight, fisher if is_weighted else torch.ones_like(weight), 3, bits, dtype, 4)
    kept, delta, error = turns[0]
    for turn in turns[1:]:
        if turn[2] >= error:
            break
        kept, delta, error = turn
    assert parts.error == pytest.approx(error, rel=1e-4)
    torch.testing.assert_close(parts.b @ parts.a, delta, rtol=1e-4, atol=1e-4)
    # A value in the middle between two levels may take either.
    assert torch.isclose(parts.kept, kept, rtol=1e-4, atol=1e-5).float().mean() > 0.99
    balance = [parts.a.shape, parts.b.shape]
    assert balance == [(3, shape[1]), (shape[0], 3)]


def test_the_error_is_below_that_of_rounding_and_of_counting_alike():
    weight, fisher = draw((48, 80))
    rounding = partial(rounded, kind="nf2", dtype=torch.float32)

    def error(parts):
        return float((fisher * (weight - parts.kept - parts.b @ parts.a).square()).sum())

    of = partial(decompose, weight, 8, rounding, iterations=50, generator=None)
    by_fisher, alike = of(sensitivity=fisher), of(sensitivity=None)
    assert error(by_fisher) == pytest.approx(by_fisher.error, rel=1e-4)
    assert error(by_fisher) < 0.9 * error(alike)
    assert alike.error < 0.95 * float((weight - rounding(weight)).square().sum())
    first = decompose(weight, 8, rounding, sensitivity=fisher, iterations=1, generator=None)
    assert by_fisher.error < first.error


def test_rows_and_columns_without_gradient_can_be_divided_by():
    weight, fisher = draw((10, 12))
    fisher[3], fisher[:, 5] = 0, 0
    for sensitivity in (fisher, torch.zeros_like(fisher)):
        parts = decompose(
            weight,
            2,
            partial(rounded, kind="nf3", dtype=torch.float32),
            sensitivity=sensitivity,
            iterations=5,
            generator=None,
        )
        assert all(bool(part.isfinite().all()) for part in (parts.kept, parts.a, parts.b))


def test_the_randomised_decomposition_is_nearly_the_whole_one():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(90, 60, generator=generator))[0]
    other = torch.linalg.qr(torch.randn(70, 60, generator=generator))[0]
    matrix = basis @ torch.diag(0.8 ** torch.arange(60.0)) @ other.mT
    left, right = leading(matrix, 8, generator)
    exact = basis[:, :8] @ torch.diag(0.8 ** torch.arange(8.0)) @ other[:, :8].mT
    torch.testing.assert_close(left @ right, exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(left.mT @ left, right @ right.mT, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf2", "nf3", "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_were_stored_are_kept_without_loss(kind, dtype):
    torch.manual_seed(0)
    values = rounded(torch.randn(33, 130), kind, dtype)
    stage = Compact(values.shape, kind, torch.float32, torch.device("cpu"))
    codes, scales = stage.encode(values.to(dtype))
    with torch.no_grad():
        stage.scale.copy_(scales)
    assert torch.equal(stage.decode(codes, torch.float32), values)
