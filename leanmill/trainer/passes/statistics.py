"""What the inputs of linear layers look like on calibration text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leanmill.core.passes import InputStatistics
from leanmill.parallel.collectives import sum_over_ranks


@contextmanager
def watched(layers: Mapping[str, nn.Linear], *, with_gram: bool) -> Iterator[dict[str, Watch]]:
    """Collect the inputs' statistics of each layer while the block runs.

    Layers that are called with one and the same tensor (query, key, value) share what is computed.
    """
    watches = {name: Watch(layer.in_features, with_gram) for name, layer in layers.items()}
    last: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def hook(watch: Watch, tokens: Tensor) -> None:
        if id(tokens) not in last or last[id(tokens)][0] is not tokens:
            last.clear()
            last[id(tokens)] = (tokens, *_sums(tokens, with_gram))
        watch.add(tokens, *last[id(tokens)][1:])

    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, watch=watches[name]: hook(watch, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()


class Watch:
    """Running sums over the inputs of one layer."""

    def __init__(self, in_features: int, with_gram: bool) -> None:
        self._num_tokens = 0
        self._square_sum = torch.zeros(in_features)
        self._gram = torch.zeros(in_features, in_features) if with_gram else None

    def add(self, tokens: Tensor, square_sum: Tensor, gram: Tensor | None) -> None:
        """Add what was summed over `tokens` [..., in]."""
        self._num_tokens += tokens.shape[:-1].numel()
        self._square_sum += square_sum.cpu()
        if self._gram is not None and gram is not None:
            self._gram += gram.cpu()

    def total(self) -> InputStatistics:
        """Return the sums over all ranks. A collective."""
        return InputStatistics(
            num_tokens=int(sum_over_ranks(torch.tensor(self._num_tokens))),
            square_sum=sum_over_ranks(self._square_sum),
            gram=None if self._gram is None else sum_over_ranks(self._gram),
        )


def _sums(tokens: Tensor, with_gram: bool) -> tuple[Tensor, Tensor | None]:
    rows = tokens.detach().reshape(-1, tokens.shape[-1]).float()
    return rows.square().sum(0), rows.t() @ rows if with_gram else None
