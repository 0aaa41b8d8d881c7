"""What routers need to know of the tokens they see: which are padding, and where sequences begin."""

from __future__ import annotations

from torch import Tensor

from leanmill.core.batches import Batch
from leanmill.core.errors import RunError
from leanmill.core.stage import TechniqueModule


class Tokens(TechniqueModule):
    """Those of the micro-batch in training; one of a model, written before its forward.

    Routers that are computed again in backward find what they found before, since no other micro-batch
    begins in between.
    """

    mask: Tensor | None
    """bool [T]: False for padding, which is not routed and counts nowhere; None where all tokens are real. Tokens
    without a label are real: prompts are routed."""
    num_sequences: int

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None, persistent=False)
        self.num_sequences = 1

    def begin_forward(self, batch: Batch) -> None:
        """Take what a micro-batch says: `input_ids` [B, S], and `token_mask` [B, S] where rows are padded."""
        mask = batch.get("token_mask")
        self.mask = None if mask is None else mask.reshape(-1).bool()
        self.num_sequences = len(batch["input_ids"])

    def of(self, num_tokens: int) -> tuple[Tensor | None, int]:
        """Return the mask and the number of sequences of the tokens that a router sees.

        Raises:
            RunError: It sees others than the micro-batch's, so that nobody knows which are padding.
        """
        if self.mask is not None and len(self.mask) != num_tokens:
            raise RunError(
                f"a router sees {num_tokens} of {len(self.mask)} tokens of which some are padding; set "
                f"data.long_documents: split, which pads nothing, or remove the technique that leaves tokens out"
            )
        return self.mask, self.num_sequences if num_tokens % self.num_sequences == 0 else 1
