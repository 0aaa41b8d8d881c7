"""Codes in other encodings stand for the same values, or are refused by name."""

import itertools

import pytest
import torch

from leanmill.core.facets import Codes
from leanmill.export.packed_layers import PackedLinear
from leanmill.export.recode import NAMES, recoded, why_not


def codes_of(encoding, zero, first, last):
    values = torch.arange(first, last + 1).repeat(5)[: 5 * (last - first + 1)].view(5, -1)
    dtype = torch.int8 if encoding == "ternary" else torch.uint8
    return Codes(values=values.to(dtype), encoding=encoding, scales=torch.rand(5, 1) + 0.1, zero=zero)


SOURCES = {
    "ternary": codes_of("ternary", 0.0, -1, 1),
    "symmetric 2 bits": codes_of(2, 1.0, 0, 2),
    "signed 2 bits": codes_of(2, 2.0, 0, 3),
    "midrise 2 bits": codes_of(2, 1.5, 0, 3),
    "midrise 1 bit": codes_of(1, 0.5, 0, 1),
    "symmetric 3 bits": codes_of(4, 3.0, 0, 6),
    "8 bits": codes_of(8, 128.0, 0, 255),
}
FITS = {
    "ternary": {"ternary", 2, 4, 8},
    "symmetric 2 bits": {"ternary", 2, 4, 8},
    "signed 2 bits": {2, 4, 8},
    "midrise 2 bits": {2, 4, 8},
    "midrise 1 bit": {1, 2, 4, 8},
    "symmetric 3 bits": {4, 8},
    "8 bits": {8},
}


@pytest.mark.parametrize(("source", "encoding"), itertools.product(SOURCES, NAMES))
def test_values_stay_what_they_are(source, encoding):
    codes = SOURCES[source]
    found = recoded(codes, encoding)
    assert (found is not None) == (encoding in FITS[source])
    reason = why_not("layer", codes, encoding)
    if found is None:
        assert reason is not None
        assert "layer has codes" in reason
        assert "type --packing" in reason
        return
    assert reason is None
    assert found.encoding == encoding
    before, after = (PackedLinear.of(one, None, int8_activations=False).weight_values() for one in (codes, found))
    assert torch.equal(before, after)


def test_the_reason_names_what_fits():
    assert "codes 0 to 6, and int2 takes 0 to 3; type --packing int4" in str(
        why_not("a", SOURCES["symmetric 3 bits"], 2)
    )
    assert "type --packing ternary" in str(why_not("a", SOURCES["ternary"], 1))
