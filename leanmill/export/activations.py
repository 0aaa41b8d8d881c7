"""What an export does about stages on activations, which a plain layer does not have."""

from __future__ import annotations

from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.sites import iter_sites
from leanmill.export.formats import Activations


def settle_activations(model: Any, activations: Activations, packing: str = "none") -> tuple[str, ...]:
    """Take off the input stages that folding must not meet; return notes for the report.

    Stages that the packing repeats, or that the weight cancels, go without a word; others need
    `activations: float`.

    Args:
        model: The trained model, its sites in place; changed.
        activations: What was asked for.
        packing: Name of the format.

    Raises:
        ConfigError: The export would compute something else than was trained, and nobody asked for that.
    """
    _check_kept(model, packing)
    lost: dict[str, int] = {}
    formats: list[tuple[str, ...]] = []
    for _, site in iter_sites(model):
        for stage in site.input_stages():
            if not stage.is_cancelled and packing not in stage.formats:
                lost[stage.technique] = lost.get(stage.technique, 0) + 1
                formats.append(stage.formats)
    if lost and activations == "trained":
        common = set.intersection(*map(set, formats))
        other = f"--to {' or '.join(sorted(common))}, whose layers do, or " if common else ""
        raise ConfigError(
            f"{_listed(lost)} round the input of layers, which a plain layer does not repeat; type {other}"
            f"--activations float to write a model that computes with float activations"
        )
    for _, site in iter_sites(model):
        for stage in site.input_stages():
            if not stage.is_cancelled:
                del site.inputs[stage.slot.key]
                left = stage.unrounded()
                if left is not None:
                    site.put_input(left)
    return (f"written with float activations, as asked: training rounded them ({_listed(lost)})",) if lost else ()


def _check_kept(model: Any, packing: str) -> None:
    """Refuse stages that the model cannot do without and the format does not repeat."""
    for name, site in iter_sites(model):
        for stage in site.input_stages():
            if not stage.may_be_left_out and packing not in stage.formats:
                raise ConfigError(
                    f"{stage.technique} changes the input of {name} as a plain layer does not, and the model cannot do "
                    f"without; type --to {' or '.join(sorted(stage.formats))}, whose layers do the same"
                )


def _listed(lost: dict[str, int]) -> str:
    return ", ".join(f"{technique} on {count} weights" for technique, count in lost.items())
