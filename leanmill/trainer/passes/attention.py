"""The attention maps of a model on calibration rows, a block in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from leanmill.core.transposed import transposed_weights
from leanmill.models.build import build_on_meta
from leanmill.models.pretrained import local_folder, pretrained_config
from leanmill.parallel.launch import Ranks
from leanmill.parallel.precision import resolve_precision
from leanmill.recipe.compress import CalibratedRecipe
from leanmill.trainer.passes.folder import SourceFolder
from leanmill.trainer.passes.maps import attention_maps
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
    source = SourceFolder(folder, transposed_weights(build_on_meta(model, packed=False)))
    stream = BlockStream(source, model, rows, device=ranks.device, dtype=dtype)
    for block in stream.blocks():
        with attention_maps(stream.model, block, partial(see, block.index)):
            stream.advance(block)
    return len(stream)
