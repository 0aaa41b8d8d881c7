"""What every tracker is told of a step and of an evaluation, by the same names. Imports no torch."""

from __future__ import annotations

from leanmill.report.loggers.facts import device_peak, utilisation
from leanmill.report.observer import EvalRecord, RunInfo, StepRecord


class Scalars:
    """Numbers of records by name.

    Args:
        info: The run's facts: what utilisation is counted from.
    """

    def __init__(self, info: RunInfo) -> None:
        self._info, self._peak = info, device_peak(info)

    def of_step(self, record: StepRecord) -> dict[str, float]:
        """Return loss terms, gradient, rate, speed, memory and what rules report."""
        found = {f"loss/{name}": value for name, value in record.losses.items()} | {
            "tokens": float(record.tokens),
            "train/grad_norm": record.grad_norm,
            "train/lr": record.lr,
            "train/skipped_steps": float(record.skipped_steps),
            "speed/tokens_per_second": record.tokens_per_second,
            "speed/step_seconds": record.step_seconds,
            "speed/model_tflops_per_second": record.tokens_per_second * self._info.flops_per_token / 1e12,
            "memory/peak_gib": record.peak_memory_bytes / 2**30,
        }
        if record.epoch is not None:
            found["train/epoch"] = record.epoch
        share = utilisation(self._info, self._peak, record.tokens_per_second)
        if share is not None:
            found["speed/mfu"] = share
        return found | {f"rules/{name}": value for name, value in record.metrics.items()}


def of_evaluation(record: EvalRecord) -> dict[str, float]:
    """Return scores by domain, and what probes report."""
    found = {f"eval_probes/{name}": value for name, value in record.metrics.items()}
    for domain, score in record.domains.items():
        found[f"eval_loss/{domain}"] = score.loss
        if score.bits_per_byte is not None and score.perplexity is not None:  # of text that is predicted
            found[f"eval_bits_per_byte/{domain}"] = score.bits_per_byte
            found[f"eval_perplexity/{domain}"] = score.perplexity
    return found
