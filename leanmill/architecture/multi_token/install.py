"""Putting multi-token prediction behind a model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from leanmill.architecture.multi_token.around import Depth, FurtherTokens, SeenBlock, Stream
from leanmill.architecture.multi_token.rule import WeightRule
from leanmill.core.around import arounds, put_around
from leanmill.core.blocks import decoder_blocks
from leanmill.core.dataflow import check_blocks, final_norm
from leanmill.core.errors import ConfigError
from leanmill.core.ledger import Ledger
from leanmill.core.shared_head import SharedHead
from leanmill.core.sites import Sites


_TECHNIQUE = "multi_token"


def install(
    sites: Sites, ledger: Ledger, *, depth: int, weight: float, late_weight: float, late_from: float
) -> WeightRule:
    """Put `depth` blocks behind the model's last norm; see `MultiToken` for the other arguments.

    Raises:
        ConfigError: The family's blocks or what follows them have another form, or another entry is there.
    """
    model: Any = sites.model
    check_blocks(model, _TECHNIQUE)
    head, norm, blocks = SharedHead(model, _TECHNIQUE), final_norm(model), decoder_blocks(model)
    if norm is None:
        raise ConfigError(
            f"{_TECHNIQUE} needs a model that goes from its last block through one norm to a head, and model type "
            f"{model.config.model_type!r} does more; choose another family, e.g. llama, or remove {_TECHNIQUE}"
        )
    if any(around.technique == _TECHNIQUE for around in arounds(norm)):
        raise ConfigError(f"{_TECHNIQUE} is listed twice; keep one entry, with the larger depth")
    make_norm = _like(norm)
    hidden_size: int = model.config.get_text_config().hidden_size
    depths = [Depth(hidden_size, make_norm, _new_block(model, blocks)) for _ in range(depth)]
    accounts = [
        ledger.open(f"{_TECHNIQUE}/{number}", per="token", weight=weight / depth) for number in range(1, depth + 1)
    ]
    stream = Stream()
    ledger.before_forward(stream.see_batch)
    put_around(blocks[-1], SeenBlock(stream))
    has_place = hasattr(model.config, "num_mtp_layers")
    put_around(norm, FurtherTokens(model, head, stream, depths, accounts, family_has_place=has_place))
    return WeightRule(accounts, head, weight=weight, late_weight=late_weight, late_from=late_from)


def _like(norm: nn.Module) -> Callable[[], nn.Module]:
    """Return a maker of norms of the same kind and size, on meta."""
    own = {name: p for name, p in norm._parameters.items() if p is not None}

    def make() -> nn.Module:
        # Not deeply: what stands around it may know the whole model.
        new = copy.copy(norm)
        new.__dict__ = {key: value for key, value in vars(norm).items() if key != "forward"}
        new._parameters = dict(norm._parameters) | {
            name: nn.Parameter(torch.empty_like(p, device="meta")) for name, p in own.items()
        }
        new._modules = {}
        return new

    return make


def _new_block(model: Any, blocks: list[nn.Module]) -> nn.Module:
    """Return a block like the last one, with weights of its own, on meta."""
    kind: Any = type(blocks[-1])
    try:
        with torch.device("meta"):
            block: nn.Module = kind(model.config.get_text_config(), len(blocks) - 1)
    except Exception as error:
        raise ConfigError(
            f"{_TECHNIQUE} builds further blocks from a configuration and an index, and those of model type "
            f"{model.config.model_type!r} need more; choose another family, e.g. llama, or remove {_TECHNIQUE}"
        ) from error
    return block.train(model.training)
