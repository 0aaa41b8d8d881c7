"""What stands around the blocks of a model with a side network."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from leanmill.core.around import Around, Call, OwnForm, Ring
from leanmill.core.documents import as_tensor
from leanmill.core.errors import ConfigError
from leanmill.peft_ext.side_network.network import Seen, SideNetwork, Stream


_TECHNIQUE = "side_network"


class ReadBlock(Around):
    """Shows a side network what a block is given.

    Args:
        stream: Of the forward.
        is_first: Whether it is the first that is read.
    """

    technique: ClassVar[str] = _TECHNIQUE
    ring: ClassVar[Ring] = Ring.TAP

    def __init__(self, stream: Stream, *, is_first: bool) -> None:
        super().__init__()
        self.stream, self.is_first = stream, is_first

    def forward(self, call: Call, /, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.stream.see(hidden, kwargs, is_first=self.is_first)
        return call(hidden, *args, **kwargs)

    def fold(self, module: Any) -> None:
        raise ConfigError(NOT_MERGED)


class BesideBlocks(Around):
    """A side network: behind the last block, or before the first late one.

    Args:
        network: The network; its parameters are shared out with the block's.
        stream: Of the forward.
        settings: What an export notes of it beside `base`.
        is_before: Whether the block goes on from what it makes.
    """

    technique: ClassVar[str] = _TECHNIQUE
    # As a branch of the last block it adds to what comes out of it.
    ring: ClassVar[Ring] = Ring.BRANCH

    def __init__(self, network: SideNetwork, stream: Stream, settings: dict[str, Any], *, is_before: bool) -> None:
        super().__init__()
        self.network, self.stream, self.settings, self.is_before = network, stream, settings, is_before

    def forward(self, call: Call, /, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**kwargs, "attention_mask": as_tensor(kwargs.get("attention_mask"))}
        states, seen = self.stream.take(), Seen(given, self.stream.num_past)
        if self.is_before:
            return call(self.network([*states, hidden], seen), *args, **kwargs)
        return self.network([*states, call(hidden, *args, **kwargs)], seen)

    def decays(self, name: str) -> bool:
        return True

    def reset_parameters(self) -> None:
        self.network.reset_parameters()

    def own_form(self) -> OwnForm:
        return OwnForm(make=self._with_base, prefix="base.")

    def _with_base(self, model: Any) -> Any:
        from leanmill.peft_ext.side_network.modeling_side_network import with_base

        return with_base(model, self.network, self.settings)

    def fold(self, module: Any) -> None:
        raise ConfigError(NOT_MERGED)


NOT_MERGED = (
    "side_network reads the hidden states of many blocks, so that no weight of the model could hold it; export it with "
    "`--to hf_code`, which writes the model and the network as one"
)
