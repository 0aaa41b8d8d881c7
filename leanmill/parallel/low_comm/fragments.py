"""Which weights travel together."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from leanmill.core.blocks import decoder_blocks
from leanmill.parallel.naming import state_parameters


def fragments_of(model: nn.Module, names: Collection[str], layers_per_fragment: int) -> list[list[str]]:
    """Deal decoder blocks out to fragments in turn, so that each has blocks of all depths (strided fragments).

    What lies in no block (embeddings, norms, a head) is one more fragment, the first.

    Args:
        model: The causal LM, sharded or not.
        names: What is dealt out, as in `state_parameters`.
        layers_per_fragment: Blocks of each; the last ones may have one less.

    Returns:
        Names of each fragment, none of them empty.
    """
    blocks = decoder_blocks(model)
    num_fragments = -(-len(blocks) // layers_per_fragment)
    block_of = {id(p): index for index, block in reversed(list(enumerate(blocks))) for p in block.parameters()}
    found: list[list[str]] = [[] for _ in range(1 + num_fragments)]
    for name, parameter in state_parameters(model):
        if name in names:
            block = block_of.get(id(parameter))
            found[0 if block is None else 1 + block % num_fragments].append(name)
    return [fragment for fragment in found if fragment]
