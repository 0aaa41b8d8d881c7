"""Putting a side network beside the blocks of a model."""

from __future__ import annotations

from typing import Any

import torch

from leanmill.core.around import iter_arounds
from leanmill.core.dataflow import check_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.peft_ext.side_network.around import BesideBlocks, ReadBlock
from leanmill.peft_ext.side_network.network import NETWORKS, Stream


_TECHNIQUE = "side_network"


def install(sites: Sites, *, method: str, size: int | None, every: int, late_blocks: int, keeps_base: bool) -> None:
    """Let a side network read the blocks of a model and stand behind or among them; see `config.py` for the arguments.

    Raises:
        ConfigError: The model has too few blocks, or such as return more than hidden states; or another one is there.
    """
    model: Any = sites.model
    check_blocks(model, _TECHNIQUE)
    if any(around.technique == _TECHNIQUE for _, _, around in iter_arounds(model)):
        raise ConfigError("side_network is listed twice; keep one entry")
    blocks = sites.modules("block")
    is_before = method == "sherl"
    where = len(blocks) - late_blocks
    # Behind the last block, what it is given is read too.
    read = range(0, where if is_before else len(blocks), every)
    if where < 0 or not read:
        raise ConfigError(
            f"side_network.late_blocks={late_blocks} leaves none of the model's {len(blocks)} blocks to be read; "
            f"set late_blocks: {max(1, len(blocks) - 1)} or less"
        )
    hidden_size: int = model.config.get_text_config().hidden_size
    size = size or max(1, hidden_size // 2)
    settings = {
        "method": method,
        "size": size,
        "read": list(read),
        "where": where,
        "keeps_base": keeps_base,
        "blocks": blocks[0].name.rpartition(".")[0],
    }
    stream = Stream()
    for index in read:
        blocks[index].around(ReadBlock(stream, is_first=index == 0))
    with torch.device("meta"):
        network = NETWORKS[method](hidden_size, len(read) + 1, size, keeps_base)
    blocks[where].around(BesideBlocks(network, stream, settings, is_before=is_before))
