"""What routers need to know of the tokens they see: which are padding, where sequences begin, and what they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leanmill.core.batches import Batch
from leanmill.core.errors import RunError
from leanmill.core.stage import TechniqueModule


class Tokens(TechniqueModule):
    """Those of the micro-batch under way; one of a model, written before its forward.

    Routers that are computed again in backward find what they found before, since no other micro-batch
    begins in between.
    """

    mask: Tensor | None
    """bool [T]: False for padding, which is not routed and counts nowhere; None where all tokens are real. Tokens
    without a label are real: prompts are routed. Of training."""
    row_ids: Tensor | None
    """int64 [B]: numbers of the rows in the order of the data. Of training."""
    ids: Tensor | None
    """int64 [T]: what the tokens are, where someone asked for `watch`; in eval mode too."""
    num_sequences: int

    def __init__(self) -> None:
        super().__init__()
        for name in ("mask", "row_ids", "ids"):
            self.register_buffer(name, None, persistent=False)
        self.num_sequences = 1
        self.is_watching = False

    def begin_forward(self, batch: Batch) -> None:
        """Take a micro-batch's `input_ids` [B, S], `row_ids` [B], and `token_mask` [B, S] where rows are padded."""
        mask = batch.get("token_mask")
        self.mask = None if mask is None else mask.reshape(-1).bool()
        self.row_ids = batch.get("row_ids")
        self.num_sequences = len(batch["input_ids"])

    def watch(self, model: nn.Module) -> None:
        """Note what goes into the embedding of a causal LM, in eval mode too."""
        if not self.is_watching:
            self.is_watching = True
            model.get_input_embeddings().register_forward_pre_hook(self._see)  # type: ignore[operator]

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.ids, self.num_sequences = args[0].detach().reshape(-1), len(args[0])

    def of(self, num_tokens: int, *, is_training: bool) -> tuple[Tensor | None, int]:
        """Return the mask and the number of sequences of the tokens that a router sees.

        Raises:
            RunError: It sees others than the micro-batch's, so that nobody knows which are padding.
        """
        is_known = is_training or self.is_watching
        num_sequences = self.num_sequences if is_known and num_tokens % self.num_sequences == 0 else 1
        if not is_training or self.mask is None:
            return None, num_sequences
        self._check(self.mask, num_tokens, "which are padding")
        return self.mask, num_sequences

    def known_ids(self, num_tokens: int) -> Tensor:
        """Return `ids`.

        Raises:
            RunError: The router sees other tokens.
        """
        if self.ids is None:
            raise RunError("a router asks what its tokens are, and the model was called without input_ids; pass them")
        self._check(self.ids, num_tokens, "what they are")
        return self.ids

    @staticmethod
    def _check(known: Tensor, num_tokens: int, unknown: str) -> None:
        if len(known) != num_tokens:
            raise RunError(
                f"a router sees {num_tokens} of the micro-batch's {len(known)} tokens and cannot tell {unknown}; "
                f"remove the technique that leaves tokens out, or for padding set data.long_documents: split"
            )
