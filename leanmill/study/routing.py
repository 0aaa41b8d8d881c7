"""How a mixture of experts routes (`leanmill eval --routing`): OpenMoE's questions, put to the checkpoints of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from leanmill.checkpoint.finding import complete_checkpoints
from leanmill.core.errors import RunError
from leanmill.report.files import write_atomically
from leanmill.study.agreement import overlap
from leanmill.study.capture import Capture
from leanmill.study.dependence import dependence
from leanmill.study.positions import dropped_by_capacity, rate_by_position
from leanmill.trainer.evaluate_checkpoint import Evaluated, evaluate_checkpoint


log = logging.getLogger(__name__)
FILE_NAME = "routing.json"
_CAPACITY_FACTORS = ("1.0", "1.25", "1.5", "2.0")


def study_routing(checkpoint_dir: Path, overrides: Sequence[str] = ()) -> tuple[Evaluated, Path, dict[str, Any]]:
    """Evaluate a checkpoint and those of the same run before it; write what its routing depends on beside the run.

    Args:
        checkpoint_dir: A complete checkpoint of a mixture of experts.
        overrides: As for `evaluate_checkpoint`.

    Returns:
        The evaluation, the file written, and what is in it: see `document`.

    Raises:
        ConfigError: The model has no routers, or an override is wrong.
        RunError: The checkpoint is damaged, or the file cannot be written. Damaged earlier ones are passed over.
    """
    evaluated, last = _capture(checkpoint_dir, overrides)
    assert evaluated.step is not None
    earlier: list[tuple[int, Capture]] = []
    for path, _ in reversed(complete_checkpoints(checkpoint_dir.parent)):
        if path == checkpoint_dir:
            continue
        try:
            other, capture = _capture(path, overrides)
        except RunError as error:
            log.warning("left out of the study: %s", error)
            continue
        if other.step is not None and other.step < evaluated.step:
            earlier.append((other.step, capture))
    found = document(evaluated.step, last, sorted(earlier, key=lambda one: one[0]))
    path = checkpoint_dir.parent.parent / FILE_NAME
    write_atomically(path, json.dumps(found))
    return evaluated, path, found


def _capture(checkpoint_dir: Path, overrides: Sequence[str]) -> tuple[Evaluated, Capture]:
    captures: list[Capture] = []

    def probes(model: Any) -> list[Capture]:
        captures.append(Capture(model))
        return captures

    return evaluate_checkpoint(checkpoint_dir, overrides, probes), captures[0]


def document(step: int, last: Capture, earlier: Sequence[tuple[int, Capture]] = ()) -> dict[str, Any]:
    """Return what the study found, JSON-able; lists go by layer.

    Args:
        step: Of the checkpoint.
        last: What its routers chose.
        earlier: Steps of earlier checkpoints, ascending, and what theirs chose for the same tokens.

    Returns:
        `step`; `layers`, numbers of the blocks; `dependence`, the fields of `Dependence` by layer, None where too
        little repeats; `learning`, the `Overlap` of each earlier checkpoint; `drops`: share of choices dropped by
        position, `as_run` (None where none was) and `by_capacity`.
    """
    layers = [last.all_domains(index) for index in range(len(last.layers))]
    found = [dependence(routed) for routed in layers]
    fields = ("token", "previous_token", "position", "agreement", "agreement_by_chance", "num_tokens")
    return {
        "step": step,
        "layers": last.layers,
        "dependence": {key: [None if one is None else getattr(one, key) for one in found] for key in fields},
        "learning": [{"step": other, **_overlaps(last, capture)} for other, capture in earlier],
        "drops": _drops(last),
    }


def _overlaps(last: Capture, other: Capture) -> dict[str, list[float]]:
    found = []
    for index in range(len(last.layers)):
        one, two = last.all_domains(index), other.all_domains(index)
        real = one.is_real
        found.append(asdict(overlap(one.experts[real], two.experts[real], one.num_experts)))
    return {key: [one[key] for one in found] for key in ("share", "by_chance")}


def _drops(last: Capture) -> dict[str, Any]:
    """Means over layers."""
    layers = [last.all_domains(index) for index in range(len(last.layers))]
    as_run = [one.experts == one.num_experts for one in layers]
    by_capacity = {
        factor: _mean([rate_by_position(dropped_by_capacity(one, float(factor)), one.is_real) for one in layers])
        for factor in _CAPACITY_FACTORS
    }
    dropped = any(bool((drops & one.is_real[:, :, None]).any()) for drops, one in zip(as_run, layers, strict=True))
    rates = [rate_by_position(drops, one.is_real) for drops, one in zip(as_run, layers, strict=True)]
    return {
        "sequence_length": layers[0].tokens.shape[1],
        "as_run": _mean(rates) if dropped else None,
        "by_capacity": by_capacity,
    }


def _mean(rates: list[list[float]]) -> list[float]:
    return [float(rate) for rate in np.mean(rates, axis=0)]
