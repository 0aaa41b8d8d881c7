"""ZipLM. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig


class ZipLm(SurgeryConfig):
    """Remove heads and neurons until the model is so many times faster, by a table of measured latencies.

    Kurtic et al. 2023, arXiv:2302.04089. In each layer key-value heads with their query heads, and neurons, go one at a
    time, that whose absence costs the output least once the others make up for it; how many go in which layer, a
    dynamic program chooses. Whole attentions and MLPs may go.
    """

    type: Literal["ziplm"] = "ziplm"
    """Name of the pass."""
    speedup: float = Field(gt=1)
    """How many times faster the decoder blocks become, by the table."""
    further_speedups: list[float] = Field(default_factory=list)
    """Others, whose models are written too, into folders `speedup-2` and so on within the output."""
    batch_size: int = Field(default=1, ge=1)
    """Rows of a forward whose latency is measured."""
    sequence_length: int = Field(default=128, ge=1)
    """Tokens of a row of it; for generation a token at a time, 1."""
    latency_table: str | None = None
    """File of latencies, JSON: measured and written here where it is not there, and read where it is, so that a table
    of another machine serves. None measures anew. Device and dtype are those of the pass."""
    damping: float = Field(default=0.01, gt=0)
    """Added to the diagonal of a layer's Hessian, as a share of its mean."""
    shrink: float = Field(default=0.9, gt=0, lt=1)
    """The numbers of neurons that are considered: each is this times the last."""
    multiple_of: int = Field(default=8, ge=1)
    """Of which they become multiples."""

    @field_validator("further_speedups")
    @classmethod
    def _are_faster(cls, value: list[float]) -> list[float]:
        if any(not 1 < speedup < float("inf") for speedup in value) or len(set(value)) < len(value):
            raise ConfigError(
                f"ziplm.further_speedups={value} are to be numbers above 1, each once; type e.g. [1.5, 2]"
            )
        return value

    @property
    def looks(self) -> bool:
        return True

    @property
    def writes_further(self) -> bool:
        return bool(self.further_speedups)

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.ziplm.latency import Setting
        from leanmill.sparse.ziplm.surgeon import ZipLmSurgeon

        return ZipLmSurgeon(
            speedups=[self.speedup, *(other for other in self.further_speedups if other != self.speedup)],
            setting=Setting(batch_size=self.batch_size, sequence_length=self.sequence_length, table=self.latency_table),
            damping=self.damping,
            shrink=self.shrink,
            multiple_of=self.multiple_of,
        )
