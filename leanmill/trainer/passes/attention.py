"""The attention maps of a model on calibration rows, a block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from leanmill.core.errors import ConfigError
from leanmill.core.places import find_modules
from leanmill.models.pretrained import local_folder, pretrained_config
from leanmill.parallel.launch import Ranks
from leanmill.parallel.precision import resolve_precision
from leanmill.recipe.compress import CalibratedRecipe
from leanmill.trainer.passes.folder import SourceFolder
from leanmill.trainer.passes.run import calibration_rows
from leanmill.trainer.passes.stream import BlockStream


def see_attention(recipe: CalibratedRecipe, ranks: Ranks, see: Callable[[int, Tensor], None]) -> int:
    """Call `see` with each layer's maps [B, heads, S, S] of each of this rank's batches; return the number of layers.

    Raises:
        ConfigError: The model has no attention whose maps can be had.
    """
    pretrained_config(recipe.model)
    folder = local_folder(str(recipe.model.path), recipe.model.revision)
    # The one implementation that has maps.
    model = recipe.model.model_copy(update={"path": str(folder), "revision": None, "attention": "eager"})
    dtype = torch.bfloat16 if resolve_precision(recipe.precision, ranks.device.type) == "bf16" else torch.float32
    rows = calibration_rows(recipe, folder, ranks)
    stream = BlockStream(SourceFolder(folder), model, rows, device=ranks.device, dtype=dtype)
    layer_of = {id(module): layer for _, layer, module in find_modules(stream.model, "attention")}

    def note(module: Any, args: Any, output: Any) -> None:
        maps = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if not isinstance(maps, Tensor) or maps.dim() != 4:
            raise ConfigError(
                f"attention of model type {stream.model.config.model_type!r} does not return its maps, so their ranks "
                f"are not known; choose another family, e.g. llama"
            )
        see(int(layer_of[id(module)] or 0), maps)

    for block in stream.blocks():
        with ExitStack() as stack:
            for module in block.module.modules():
                if id(module) in layer_of:
                    stack.callback(module.register_forward_hook(note).remove)
            stream.advance(block)
    return len(stream)
