"""What a profile says, in plain numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from leanmill.trainer.profile.timeline import Owner, Phase


PHASES: tuple[Phase, ...] = ("data", "forward", "recomputation", "backward", "update")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A class of modules, or a block. Seconds are of one step."""

    name: str
    count: int
    """Modules."""
    forward: float = 0.0
    recomputation: float = 0.0
    backward: float = 0.0
    kept_bytes: int = 0
    """Of one micro-batch, for backward."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.forward + self.recomputation + self.backward


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One rank's steps, means over `num_steps`; `over_ranks` holds what others differ in."""

    engine: str
    world_size: int
    num_steps: int
    tokens_per_step: int
    flops_per_step: float
    """Of all ranks together, as `plan` counts them."""
    step_seconds: float
    phases: dict[str, float]
    """Seconds of a step by phase; what a rank waits for others is in the phase it waits in."""
    communication: dict[str, float]
    """Seconds of one step in which a kind of collective was under way, hidden or not; `any` is of all kinds."""
    classes: list[Part]
    """By class of module, the time of a module without that of those that it calls; longest first."""
    blocks: list[Part]
    """Decoder blocks in order, each with all in it; then what lies outside of them."""
    peak_bytes: int
    """On CUDA allocated by torch, on the CPU resident in the process."""
    kept_bytes: int
    """For backward, by one micro-batch; blocks that are recomputed keep what comes in."""
    over_ranks: dict[str, dict[str, float]] = field(default_factory=dict)
    """Least, median and most over ranks of step, phases, communication and peak."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, seconds of parts included."""
        plain = asdict(self)
        for key in ("classes", "blocks"):
            for raw, part in zip(plain[key], getattr(self, key), strict=True):
                raw["seconds"] = part.seconds
        return plain


def by_phase(totals: Mapping[Owner, float], num_steps: int) -> dict[str, float]:
    """Return seconds of a step by phase."""
    found = dict.fromkeys(PHASES, 0.0)
    for owner, seconds in totals.items():
        found[owner.phase] += seconds / num_steps
    return {str(phase): seconds for phase, seconds in found.items()}


def by_class(
    totals: Mapping[Owner, float], kept: Mapping[str, int], classes: Mapping[str, str], num_steps: int
) -> list[Part]:
    """Add up what modules of one class take themselves.

    Args:
        totals: See `Timeline.totals`.
        kept: See `ModuleHooks.kept`.
        classes: Class of each module by path.
        num_steps: That `totals` are of.
    """
    return sorted(_grouped(totals, kept, classes, num_steps), key=lambda part: -part.seconds)


def by_block(
    totals: Mapping[Owner, float], kept: Mapping[str, int], blocks: Sequence[str], paths: Sequence[str], num_steps: int
) -> list[Part]:
    """Add up what lies in each block, and outside of them."""
    inside = {path: next((b for b in blocks if path == b or path.startswith(f"{b}.")), "outside") for path in paths}
    parts = {part.name: part for part in _grouped(totals, kept, inside, num_steps)}
    # Without what all have before it: `layers.0` rather than `model.model.layers.0`.
    shared = blocks[0].rpartition(".")[0].rpartition(".")[0] if blocks else ""
    return [
        replace(parts[name], name=name.removeprefix(f"{shared}.")) for name in (*blocks, "outside") if name in parts
    ]


def _grouped(
    totals: Mapping[Owner, float], kept: Mapping[str, int], names: Mapping[str, str], num_steps: int
) -> list[Part]:
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for owner, taken in totals.items():
        if owner.phase in ("forward", "backward", "recomputation") and owner.path in names:
            seconds[names[owner.path]][owner.phase] += taken / num_steps
    sizes: dict[str, int] = defaultdict(int)
    for path, size in kept.items():
        sizes[names.get(path, "outside")] += size
    counts: dict[str, int] = defaultdict(int)
    for name in names.values():
        counts[name] += 1
    return [Part(name=name, count=counts[name], kept_bytes=sizes[name], **taken) for name, taken in seconds.items()]
