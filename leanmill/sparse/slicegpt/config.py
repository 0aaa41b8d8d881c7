"""SliceGPT. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from leanmill.core.surgery import Surgeon, SurgeryConfig


class SliceGpt(SurgeryConfig):
    """Rotate the residual stream to its principal components and leave out the least of them.

    Ashkboos et al. 2024, arXiv:2401.15024. A rotation of everything that norms and matmuls see changes nothing that
    the model computes, and after it the first channels hold most of the signal, so the last ones may go.
    """

    type: Literal["slicegpt"] = "slicegpt"
    """Name of the pass."""
    hidden_size: Annotated[float, Field(gt=0, lt=1, strict=True)] | Annotated[int, Field(ge=1, strict=True)]
    """Channels of the residual stream that stay: a number, or a share of those there are. With all of them the model is
    rotated and computes what it did."""
    rotations: Literal["per_block", "shared"] = "per_block"
    """`per_block`: before each attention and each MLP the stream is rotated to its components there, as in the paper;
    the model becomes a `pruned_llama`, with a matrix for each. `shared`: one rotation for the whole stream; the model
    stays of its family, and has no matrices to multiply by."""
    multiple_of: int = Field(default=8, ge=1)
    """Channels that are given as a share become a multiple of this, the nearest."""

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.sparse.slicegpt.surgeon import SliceGptSurgeon
        from leanmill.sparse.structured.targets import Targets

        targets = Targets(technique="slicegpt", asked={"hidden_size": self.hidden_size}, multiple_of=self.multiple_of)
        return SliceGptSurgeon(targets, per_block=self.rotations == "per_block")
