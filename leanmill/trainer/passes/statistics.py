"""What the inputs of linear layers look like on calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leanmill.core.errors import RunError
from leanmill.core.gram import Gram
from leanmill.core.passes import InputStatistics
from leanmill.parallel.collectives import gather_objects, same_on_all_ranks, sum_over_ranks


class TokenCounts:
    """What the tokens of the batch under way count for."""

    now: Tensor | None = None
    """[B, S]; None is alike."""


@contextmanager
def watched(
    layers: Mapping[str, nn.Linear], *, with_gram: bool, counts: TokenCounts | None = None
) -> Iterator[list[Watch]]:
    """Collect statistics of the layers' inputs while the block runs, one `Watch` for each input.

    Layers that are called with one and the same tensor (query, key, value) share it. Afterwards the list
    holds one watch for every layer that was called, in the order of the calls.
    """
    watches: list[Watch] = []
    watch_of: dict[str, Watch] = {}

    def hook(name: str, layer: nn.Linear, tokens: Tensor) -> None:
        if name not in watch_of:
            # The first call of a layer decides whose inputs it shares.
            watch = next((w for w in watches if w.last is tokens), None)
            if watch is None:
                watch = Watch(layer.in_features, with_gram)
                watches.append(watch)
            watch.names.append(name)
            watch_of[name] = watch
        watch_of[name].see(name, tokens, None if counts is None else counts.now)

    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: hook(name, module, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield watches
    finally:
        for handle in handles:
            handle.remove()
        for watch in watches:
            watch.last = None


def check_reached(layers: Iterable[str], watches: Sequence[Watch]) -> None:
    """Make sure that every layer was called, and that ranks saw the same ones share inputs. A collective.

    Raises:
        RunError: On every rank.
    """
    called = [name for watch in watches for name in watch.names]
    missing = gather_objects(sorted(set(layers) - set(called)))
    for names in missing:
        if names:
            raise RunError(f"no calibration row of a rank reaches {names[0]}; add it to exclude, or take more rows")
    if not same_on_all_ranks([watch.names for watch in watches]):
        raise RunError(f"the layers around {called[0]} share inputs on some ranks and not on others; exclude them")


class Watch:
    """Running sums over the inputs that some layers share."""

    def __init__(self, in_features: int, with_gram: bool) -> None:
        self.names: list[str] = []
        """Of the layers; the first is the first that is called."""
        self.in_features = in_features
        self.last: Tensor | None = None
        """What the first layer was called with last."""
        self._num_tokens = 0
        self._square_sum = torch.zeros(in_features)
        self._gram = Gram(in_features) if with_gram else None

    def see(self, name: str, tokens: Tensor, counts: Tensor | None = None) -> None:
        """Take note that a layer is called with `tokens` [..., in], of which each is multiplied by `counts` [B, S].

        Raises:
            RunError: Layers that shared their input before do not now, or see other tokens than `counts` is for.
        """
        if name != self.names[0]:
            if tokens is not self.last:
                raise RunError(
                    f"{name} and {self.names[0]} share their input on some calibration rows and not on others; "
                    f"add one of them to exclude"
                )
            return
        self.last = tokens
        rows = tokens.detach().reshape(-1, self.in_features).float()
        if counts is not None:
            if counts.numel() != len(rows):
                raise RunError(f"{name} sees {len(rows)} of {counts.numel()} tokens, which count; add it to exclude")
            rows = rows * counts.reshape(-1, 1).to(rows)
        self._num_tokens += len(rows)
        self._square_sum += rows.square().sum(0).cpu()
        if self._gram is not None:
            self._gram.add(rows)

    def total(self) -> InputStatistics:
        """Return the sums over all ranks; those of this rank are used up. A collective.

        Raises:
            RunError: They are not finite.
        """
        square_sum = sum_over_ranks(self._square_sum)
        if not torch.isfinite(square_sum).all():
            raise RunError(
                f"the inputs of {self.names[0]} are not finite on the calibration rows; look at model and data"
            )
        if self._gram is not None:
            self._gram.reduce(sum_over_ranks)
        return InputStatistics(
            num_tokens=int(sum_over_ranks(torch.tensor(self._num_tokens))), square_sum=square_sum, gram=self._gram
        )
