"""What the N:M operations refuse, and what they say then."""

import pytest
import torch

from leanmill.kernels.nm_mask.op import nm_compress, nm_expand, nm_mask, nm_project


@pytest.mark.parametrize(
    ("shape", "num_kept", "group_size", "transposable", "message"),
    [
        ((4, 8), 4, 4, False, "4 of 4 is no N:M pattern.*1 to M - 1"),
        ((4, 8), 0, 4, False, "0 of 4 is no N:M pattern"),
        ((4, 8), 1, 1, False, "1 of 1 is no N:M pattern"),
        ((4, 514), 2, 257, False, "2 of 257 is no N:M pattern; allowed: .*2 to 256"),
        ((4, 10), 2, 4, False, r"\[4, 10\] has no whole groups of 4.*divides its last dim; pad"),
        ((), 2, 4, False, r"weight \[\] has no whole groups"),
        ((6, 8), 2, 4, True, r"\[6, 8\] has no whole groups.*both of its last dims"),
        ((8,), 2, 4, True, r"\[8\] has no whole groups.*\[\.\.\., out, in\]"),
        ((8, 8), 1, 4, True, "transposable masks are 2 of 4, not 1 of 4"),
    ],
)
def test_bad_patterns_and_shapes_are_refused(shape, num_kept, group_size, transposable, message):
    for function in (nm_mask, nm_project):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(shape), num_kept, group_size, transposable=transposable)
    if not transposable:
        with pytest.raises(ValueError, match=message):
            nm_compress(torch.zeros(shape), num_kept, group_size)


def test_other_bad_arguments_are_refused():
    weight = torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"\[4, 8\] of torch.int64 is not covered.*weight.float"):
        nm_project(weight.long())
    for decay in (torch.ones(2), torch.ones(1, dtype=torch.int64), torch.ones(1, device="meta")):
        with pytest.raises(ValueError, match="decay .* does not fit a weight on cpu"):
            nm_project(weight, decay=decay)
    values, indices = nm_compress(weight)
    for arguments, message in (
        ((values.long(), indices), "cannot be expanded"),
        ((values, indices.long()), "cannot be expanded"),
        ((values[:, :3], indices), "no whole groups of 2"),
        ((values, indices[:, :0]), r"indices must be \[4, 1\]"),
        ((values[:2], indices), r"indices must be \[2, 1\]"),
        ((values, indices, 3, 4), "no whole groups of 3"),
        ((values, indices, 4, 4), "no N:M pattern"),
    ):
        with pytest.raises(ValueError, match=message):
            nm_expand(*arguments)
