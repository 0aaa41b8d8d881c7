"""Memory of a distillation loss at a large vocabulary against the same from logits, and that the gradients are equal.

Each in a process of its own: forward and backward of a student's and a teacher's head.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from kernels_losses import peak_growth
from machine import conditions, write_result
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from leanmill.kernels.linear_kl.op import TeacherHead, linear_kl


NUM_TOKENS, VOCAB_SIZE, SIZE = 4096, 131_072, 256
OURS: dict[str, dict[str, Any]] = {
    "forward": {},
    "skew_forward": {"kind": "skew_forward", "beta": 0.1},
    "total_variation": {"kind": "total_variation"},
    "forward, top 64": {"top_k": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=2, metavar=("CASE", "GRADIENTS"), help="measure one in this process")
    arguments = parser.parse_args()
    if arguments.worker:
        print(measure(*arguments.worker))
        return
    measured_under = conditions()
    with tempfile.TemporaryDirectory() as made:
        peaks = {name: run(name, Path(made) / f"{index}.pt") for index, name in enumerate(["naive", *OURS])}
        expected, got = (torch.load(Path(made) / f"{index}.pt") for index in (0, 1))
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))
    figures: dict[str, Any] = {"naive_bytes": peaks["naive"], "largest_gradient_difference": apart}
    figures |= {name: {"bytes": peaks[name], "of_naive": peaks[name] / peaks["naive"]} for name in OURS}
    write_result("distill_memory", figures, measured_under)


def run(name: str, gradients: Path) -> int:
    """Measure one case in a process of its own; return its peak above the inputs and their gradients."""
    command = [sys.executable, __file__, "--worker", name, str(gradients)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:] or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(name: str, gradients: str) -> int:
    """Return the bytes at the peak of forward and backward, without inputs and their gradients."""
    torch.manual_seed(0)
    hidden, theirs = (torch.randn(NUM_TOKENS, SIZE) for _ in range(2))
    weight, their_weight = (torch.randn(VOCAB_SIZE, SIZE) / SIZE**0.5 for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_()
    # What a first call of torch sets up is no part of the loss.
    from_logits(*(t[:8].detach().requires_grad_() for t in (hidden, weight)), theirs[:8], their_weight[:8])

    def call() -> None:
        if name == "naive":
            from_logits(hidden, weight, theirs, their_weight)
        else:
            options = dict(OURS[name])
            teacher = TeacherHead(theirs, their_weight, top_k=options.pop("top_k", None))
            linear_kl(hidden, weight, teacher=teacher, **options).backward()

    growth = peak_growth(call)
    assert hidden.grad is not None
    assert weight.grad is not None
    torch.save([hidden.grad, weight.grad], gradients)
    return growth - sum(t.numel() * t.element_size() for t in (hidden, weight))


def from_logits(hidden: Tensor, weight: Tensor, theirs: Tensor, their_weight: Tensor) -> None:
    """Forward KL and its gradients with torch's own functions."""
    with torch.no_grad():
        teacher = F.linear(theirs, their_weight).log_softmax(-1)
    student = F.linear(hidden, weight).log_softmax(-1)
    F.kl_div(student, teacher, reduction="batchmean", log_target=True).backward()


if __name__ == "__main__":
    main()
