"""Which layer learns from which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from leanmill.core.errors import ConfigError


Layers = Literal["uniform", "last"] | Sequence[tuple[int, int]]


def pairs_of(
    layers: Layers, num_student: int, num_teacher: int | None, teacher: str, *, technique: str
) -> list[tuple[int, int]]:
    """Return pairs of block indices from 0.

    Args:
        layers: `uniform` pairs the student's block m of M, from 1, with the teacher's m N / M, rounded, of N
            (arXiv:1909.10351 where M divides N); `last` the last blocks; or pairs, negative from the end.
        num_student: M.
        num_teacher: N; None checks the student's indices only and returns no pairs.
        teacher: For messages.
        technique: For messages.

    Raises:
        ConfigError: A layer is out of range, or a pair is there twice.
    """
    if not layers:
        raise ConfigError(f"{technique}.layers: [] pairs nothing; set layers: last, or remove the technique")
    if isinstance(layers, str):
        if num_teacher is None:
            return []
        first = 1 if layers == "uniform" else num_student
        wanted = range(first, num_student + 1)
        return [(m - 1, max(1, round(m * num_teacher / num_student)) - 1) for m in wanted]
    student = [_index(mine, num_student, f"{technique}.layers: the student") for mine, _ in layers]
    if num_teacher is None:
        return []
    pairs = list(
        zip(
            student,
            [_index(its, num_teacher, f"{technique}.layers: teacher {teacher}") for _, its in layers],
            strict=True,
        )
    )
    twice = [list(pair) for pair in pairs if pairs.count(pair) > 1]
    if twice:
        raise ConfigError(f"{technique}.layers: the pair {twice[0]} is there twice; keep one")
    return pairs


def _index(layer: int, num_layers: int, whose: str) -> int:
    if not -num_layers <= layer < num_layers:
        raise ConfigError(
            f"{whose} has no layer {layer}; it has {num_layers}: set one of 0 to {num_layers - 1}, or -1 for the last"
        )
    return layer % num_layers
