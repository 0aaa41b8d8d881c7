"""LoLCATs. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from leanmill.core.surgery import Surgeon, SurgeryConfig


class Lolcats(SurgeryConfig):
    """Give a model linear attention behind a window of softmax attention, taught to do what its attention did.

    Zhang et al. 2024, arXiv:2410.10254. What a token needs of all before the window is a state of one size, however
    long the text. Maps of features, which replace the exponential there (Hedgehog), and a factor a head are trained on
    the outputs of the softmax attention, layer by layer; nothing else changes. The model becomes a `linear_llama`, and
    a phase with `lora` behind this pass heals what is left.
    """

    type: Literal["lolcats"] = "lolcats"
    """Name of the pass."""
    sliding_window: Annotated[int, Field(ge=2, strict=True)] = 64
    """Tokens that are attended to by softmax, a token itself among them."""
    feature_dim: Annotated[int, Field(ge=1, strict=True)] = 64
    """Columns of a head's map of features, each of which gives two features."""
    epochs: int = Field(default=2, ge=1)
    """How often the calibration rows are gone through to train the maps of a layer."""
    lr: float = Field(default=1e-2, gt=0)
    """Of AdamW, without decay, for the maps; it falls linearly to a tenth."""

    @property
    def looks(self) -> bool:
        return True

    def surgeon(self, seed: int) -> Surgeon:
        from leanmill.architecture.lolcats.surgeon import LolcatsSurgeon

        return LolcatsSurgeon(
            window=self.sliding_window, feature_dim=self.feature_dim, epochs=self.epochs, lr=self.lr, seed=seed
        )
