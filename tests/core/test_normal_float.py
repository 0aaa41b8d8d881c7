"""Levels of NormalFloat by the definition."""

from statistics import NormalDist

import pytest

from leanmill.core.normal_float import NF4_LEVELS, normal_float_levels


@pytest.mark.parametrize("num_bits", [2, 3, 4, 5])
def test_levels_are_quantiles_of_a_normal_distribution(num_bits):
    half, outermost = 2 ** (num_bits - 1), 0.9677083
    below = [1 - outermost + step * (outermost - 0.5) / (half - 1) for step in range(half - 1)]
    above = [0.5 + step * (outermost - 0.5) / half for step in range(half + 1)]
    normal = NormalDist()
    levels = [normal.inv_cdf(quantile) / normal.inv_cdf(outermost) for quantile in (*below, *above)]
    assert normal_float_levels(num_bits) == pytest.approx(levels, abs=2e-7)
    assert len(levels) == 2**num_bits
    assert {-1.0, 0.0, 1.0} <= set(normal_float_levels(num_bits))
    assert normal_float_levels(4) == NF4_LEVELS
