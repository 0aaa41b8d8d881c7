"""Experts that a token may see, by how often it occurs."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed, uniform
from leanmill.moe.routing.decision import Option
from leanmill.moe.routing.tokens import Tokens


class MaskMoe(Option):
    """Closes all but some experts, drawn once for each token of the vocabulary, to that token.

    Su et al. 2024, arXiv:2407.09816: a mask of 0 and -inf is added to the logits. Infrequent tokens see one expert, so
    that all their few occurrences train it; frequent ones see several. Each router draws its own.

    Args:
        visible: bool [vocabulary, E]: what `draw_visible` gave.
    """

    key = "mask_moe"
    changes_inference = True
    visible: Tensor

    def __init__(self, visible: Tensor) -> None:
        super().__init__()
        # Saved, so that a resumed run goes on with it whatever has become of the counts.
        self.register_buffer("visible", visible)

    def on_logits(self, logits: Tensor, tokens: Tokens) -> Tensor:
        return logits.masked_fill(~self.visible[tokens.known_ids(len(logits))], -torch.inf)


def draw_visible(is_frequent: Tensor, num_experts: int, num_visible: int, *, seed: int, name: str) -> Tensor:
    """Return which experts each token of the vocabulary sees, bool [vocabulary, E], uniformly drawn.

    Args:
        is_frequent: bool [vocabulary]: these see `num_visible` experts, others one.
        num_experts: E.
        num_visible: 1 to E.
        seed: Of the run.
        name: Of the router.
    """
    key = torch.tensor([derive_seed(seed, f"mask_moe/{name}")])
    drawn = uniform(key, torch.arange(len(is_frequent) * num_experts)).view(-1, num_experts)
    ranks = drawn.sort(dim=-1, stable=True).indices.sort(dim=-1, stable=True).indices
    return ranks < torch.where(is_frequent, num_visible, 1).unsqueeze(-1)


def frequent(counts: Tensor, share: float) -> Tensor:
    """Return the most frequent tokens that together make up at least `share` of all occurrences, bool [vocabulary]."""
    order = counts.sort(descending=True, stable=True)
    before = order.values.cumsum(0) - order.values
    return torch.zeros(len(counts), dtype=torch.bool).scatter_(0, order.indices, before < share * counts.sum())


def read_counts(path: str, vocab_size: int) -> Tensor:
    """Read how often each token of the vocabulary occurs, int64 [vocabulary], from a `.npy` file.

    Raises:
        ConfigError: It cannot be read, or holds something else.
    """
    import numpy as np

    try:
        counts = np.load(Path(path).expanduser(), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"router.mask_moe.counts: {path} cannot be read ({error}); write it with "
            f"numpy.save(path, numpy.bincount(token_ids, minlength=vocabulary))"
        ) from error
    if counts.ndim != 1 or counts.dtype.kind not in "iu" or len(counts) != vocab_size or counts.min() < 0:
        raise ConfigError(
            f"router.mask_moe.counts: {path} holds {counts.dtype} {counts.shape}; it must be one whole number, 0 or "
            f"more, for each of the {vocab_size} tokens of the vocabulary"
        )
    if not counts.any():
        raise ConfigError(f"router.mask_moe.counts: {path} counts nothing; count the tokens of the training data")
    return torch.from_numpy(counts.astype(np.int64))
