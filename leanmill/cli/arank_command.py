"""`leanmill arank`: the rank of attention in each layer of a model, which says where tokens may be left out."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from leanmill.recipe.compress import CalibratedRecipe


def run(args: argparse.Namespace) -> int:
    """Print the mean rank of every layer's attention maps, and the layers of the lowest."""
    from leanmill.core.errors import ConfigError
    from leanmill.moe.mixture_of_depths.arank import lowest
    from leanmill.recipe.compress import CalibratedRecipe
    from leanmill.recipe.io import load_recipe

    recipe = load_recipe(args.recipe, args.overrides, root=CalibratedRecipe)
    means, rank = _mean_ranks(recipe)
    num = args.num_layers or max(1, len(means) // 2)
    if num > len(means):
        raise ConfigError(f"--num-layers {num} is more than the {len(means)} layers of the model; give fewer")
    if rank == 0:
        print("layer  ARank")
        for layer, mean in enumerate(means):
            print(f"{layer:5}  {mean:.1f}")
        print(f"lowest {num}: layers: {lowest(means, num)}")
    return 0


def _mean_ranks(recipe: CalibratedRecipe) -> tuple[list[float], int]:
    """Return the mean rank over rows and heads by layer, and which process this is."""
    import torch

    from leanmill.core.errors import ConfigError
    from leanmill.moe.mixture_of_depths.arank import attention_ranks
    from leanmill.parallel.collectives import sum_over_ranks
    from leanmill.parallel.launch import finish, init_processes
    from leanmill.recipe.sections import ClusterConfig
    from leanmill.trainer.passes.attention import see_attention

    ranks = init_processes(recipe.device, ClusterConfig())
    try:
        sums: dict[int, tuple[float, int]] = {}

        def see(layer: int, maps: torch.Tensor) -> None:
            found = attention_ranks(maps)
            total, count = sums.get(layer, (0.0, 0))
            sums[layer] = total + float(found.sum()), count + found.numel()

        num_layers = see_attention(recipe, ranks, see)
        if missing := sorted(set(range(num_layers)) - sums.keys()):
            raise ConfigError(f"layer {missing[0]} has no attention, so it has no ARank; choose another model")
        table = torch.tensor([sums[layer] for layer in range(num_layers)], device=ranks.device)
        total, count = sum_over_ranks(table).unbind(1)
        return (total / count).tolist(), ranks.rank
    finally:
        finish()
