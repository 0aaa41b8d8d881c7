"""Puzzle. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from leanmill.core.errors import ConfigError
from leanmill.core.surgery import Surgeon, SurgeryConfig


KeyValueHeads = Annotated[int, Field(ge=1, strict=True)] | Literal["linear", "none"]
"""Of an alternative attention, or a matrix in its place, or nothing."""
Neurons = (
    Annotated[float, Field(gt=0, lt=1, strict=True)]
    | Annotated[int, Field(ge=1, strict=True)]
    | Literal["linear", "none"]
)
"""Of an alternative MLP as a share of what there is, or a number; a matrix in its place, or nothing."""


class Puzzle(SurgeryConfig):
    """Give each layer the attention and the MLP that a model within budgets can best afford.

    Bercovich et al. 2024, arXiv:2411.19146. Alternatives to each layer's attention (fewer key-value heads, a matrix,
    nothing) and MLP (fewer neurons, a matrix, nothing) are trained alone on what the layer puts out, and scored by what
    the whole model loses with one of its layers replaced; an integer program takes one pair a layer so that scores add
    up to the least within the budgets. The model becomes a `pruned_llama`; a phase with `distill` behind this pass is
    the paper's global distillation.
    """

    type: Literal["puzzle"] = "puzzle"
    """Name of the pass."""
    key_value_heads: list[KeyValueHeads] | None = None
    """Alternatives to a layer's attention: numbers of key-value heads, which divide those there are and keep all query
    heads, `linear` or `none`. None is halves of what there is down to 1, `linear` and `none`."""
    neurons: list[Neurons] = Field(default=[0.75, 0.5, 0.25, 0.1, "linear", "none"])
    """Alternatives to a layer's MLP: shares of its neurons or numbers, `linear` or `none`."""
    multiple_of: int = Field(default=8, ge=1)
    """Neurons that are given as a share become a multiple of this, the nearest."""
    epochs: int = Field(default=1, ge=0)
    """How often the calibration rows are gone through to train an alternative; 0 leaves it as it begins."""
    lr: float = Field(default=1e-4, gt=0)
    """Of AdamW, without decay, for alternatives; it falls linearly to a tenth."""
    score: Literal["kl", "loss"] = "kl"
    """What an alternative costs: the divergence of the model with it from the model as it was, KL(before || after) a
    token, or its loss of the next token."""
    pairs: Literal["scored", "added"] = "scored"
    """`scored`: each pair of attention and MLP of a layer is tried in the model. `added`: each half alone, and a pair
    costs their sum, which takes as many forwards as there are alternatives, not pairs."""
    parameters: Annotated[float, Field(gt=0, lt=1, strict=True)] | Annotated[int, Field(ge=1, strict=True)] | None = (
        None
    )
    """Budget: of the whole model, embeddings and head included; a share of what there is, or a number."""
    memory_bytes: Annotated[int, Field(ge=1, strict=True)] | None = None
    """Budget: weights in the dtype that is stored, and a cache of keys and values for `batch_size` rows of
    `sequence_length` tokens in the same dtype."""
    speedup: float | None = Field(default=None, gt=1)
    """Budget: how many times faster the decoder blocks become, by measured latencies."""
    batch_size: int = Field(default=1, ge=1)
    """Rows of the cache, and of a forward whose latency is measured."""
    sequence_length: int = Field(default=128, ge=1)
    """Tokens of a row of both."""
    latency_table: str | None = None
    """File of latencies, JSON: measured and written here where it is not there, and read where it is, so that a table
    of another machine serves. None measures anew. Device and dtype are those of the pass."""

    @model_validator(mode="after")
    def _has_a_budget(self) -> Puzzle:
        if self.parameters is None and self.memory_bytes is None and self.speedup is None:
            raise ConfigError(
                "puzzle: nothing bounds the model, so it would stay as it is; give parameters, memory_bytes or "
                "speedup, e.g. parameters: 0.7"
            )
        if self.latency_table is not None and self.speedup is None:
            raise ConfigError("puzzle: latency_table is for speedup; give that, or remove it")
        return self

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.puzzle.surgeon import Options, PuzzleSurgeon

        return PuzzleSurgeon(Options(**self.model_dump(exclude={"type"})))
