"""The attention maps of one block while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules
from leanmill.trainer.passes.stream import Block


@contextmanager
def attention_maps(model: nn.Module, block: Block, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `see` with the block's maps [B, heads, S, S] of each batch that runs through it; attention is `eager`.

    Raises:
        ConfigError: While it runs: the family's attention does not return its maps.
    """

    def note(module: Any, args: Any, output: Any) -> None:
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(maps, Tensor) or maps.dim() != 4:
            raise ConfigError(
                f"attention of model type {model.config.model_type!r} does not return its maps, which this "  # type: ignore[union-attr]
                f"needs; choose another family, e.g. llama"
            )
        see(maps)

    attentions = {id(module) for _, _, module in find_modules(model, "attention")}
    with ExitStack() as stack:
        for module in block.module.modules():
            if id(module) in attentions:
                stack.callback(module.register_forward_hook(note).remove)
        yield
