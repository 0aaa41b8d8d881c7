"""torch.compile, one decoder block at a time.

Blocks of one model share their code, so one compilation serves all of them; and what happens
between blocks (sharding, hooks) stays outside the graphs.
"""

from __future__ import annotations

from torch import nn

from leanmill.core.blocks import added_blocks, decoder_blocks
from leanmill.core.errors import ConfigError


def compile_blocks(model: nn.Module) -> None:
    """Compile each decoder block of `model` in place; module and parameter names do not change.

    Raises:
        ConfigError: No repeated blocks are found.
    """
    blocks = decoder_blocks(model)
    if not blocks:
        raise ConfigError(f"{type(model).__name__} has no repeated decoder blocks to compile; set train.compile=false")
    for block in (*blocks, *added_blocks(model)):
        block.compile()
