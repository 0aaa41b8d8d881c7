"""What each technique promises of the weights that a run of the contract ends with, one function a promise.

A new technique adds a line to `PROMISES` for every name that it has in `tests.contract_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trained:
    """A run that has ended."""

    before: dict[str, Tensor]
    """Every parameter at the start, by name."""
    after: dict[str, Tensor]
    """And at the end."""
    sites: dict[str, tuple[Any, Tensor]]
    """Sites and their staged weights, by name."""
    names: tuple[str, ...]
    """Techniques of the run."""

    @property
    def changed(self) -> set[str]:
        """Names of parameters that moved."""
        return {name for name in self.after if not torch.equal(self.before[name], self.after[name])}


Promise = Callable[[Trained], None]


def keeps_half(run: Trained) -> None:
    """The zeros that the model came with are still its only ones."""
    for name, (_, weight) in run.sites.items():
        assert torch.equal(weight == 0, run.before[f"{name}.weight"] == 0), name
        assert (weight == 0).float().mean() == 0.5, name


def keeps_frozen_two_of_four(run: Trained) -> None:
    """Of every four weights two are as they were, the others zero."""
    for name, (_, weight) in run.sites.items():
        kept = weight != 0
        assert (kept.reshape(-1, 4).sum(-1) == 2).all(), name
        assert torch.equal(weight[kept], run.before[f"{name}.weight"][kept]), name


def keeps_two_of_four(run: Trained) -> None:
    """Of every four weights two are zero, or more where something quantises what is kept."""
    is_exact = not {"ternary", "lsq_row"} & set(run.names)
    for name, (_, weight) in run.sites.items():
        zeros = (weight.reshape(-1, 4) == 0).sum(-1)
        assert (zeros == 2 if is_exact else zeros >= 2).all(), name


def is_zero_outside_its_mask(run: Trained) -> None:
    """A masked weight is zero."""
    for name, (site, weight) in run.sites.items():
        assert (weight[~site.stages["mask"].mask] == 0).all(), name


def keeps_as_many(run: Trained) -> None:
    """Masks that move keep as many weights as they began with."""
    for name, (site, _) in run.sites.items():
        mask = site.stages["mask"]
        assert int(mask.mask.sum()) == mask.num_active, name


def reaches_its_sparsity(run: Trained) -> None:
    """All masks together drop 60 % of the weights."""
    masks = [value for value in run.after.values() if value.dtype == torch.bool]
    total = sum(mask.numel() for mask in masks)
    assert sum(int(mask.sum()) for mask in masks) == total - round(0.6 * total)


def masks_half_of_the_neurons(run: Trained) -> None:
    """Half of the neurons of a layer are zero, and all of an attention, whose one head pair stays, is there."""
    for name, (_, weight) in run.sites.items():
        if "mlp" in name:
            zeros = (weight == 0).all(0 if "down" in name else 1)
            assert int(zeros.sum()) == len(zeros) // 2, name
        elif "self_attn" in name:
            assert (weight != 0).any(1).all(), name


def is_one_magnitude(run: Trained) -> None:
    """A weight is a scale times signs."""
    for name, (_, weight) in run.sites.items():
        assert weight.abs().unique().numel() == 1, name


def is_ternary_by_row(run: Trained) -> None:
    """A row is a scale times {-1, 0, 1}."""
    for name, (_, weight) in run.sites.items():
        assert all(row.abs().unique().numel() <= 2 for row in weight), name


def is_ternary(run: Trained) -> None:
    """A weight, of each expert, is a scale times {-1, 0, 1}."""
    for name, (_, weight) in run.sites.items():
        for matrix in weight if weight.dim() == 3 else [weight]:
            assert matrix.unique().numel() <= 3, name
            torch.testing.assert_close(matrix.unique(), -matrix.unique().flip(0), rtol=0, atol=0)


def has_eight_levels_a_row(run: Trained) -> None:
    """Three bits a weight."""
    for name, (_, weight) in run.sites.items():
        assert all(row.unique().numel() <= 8 for row in weight), name


def has_seven_levels_a_group(run: Trained) -> None:
    """Every weight is what its code stands for, of at most seven levels in a group."""
    for name, (site, weight) in run.sites.items():
        assert int(site.stages["quant"].chosen.max()) <= 6, name
        assert all(len(group.unique()) <= 7 for group in weight.reshape(-1, 8)), name


def has_sixteen_levels_a_group(run: Trained) -> None:
    """Four bits a weight; 8 weights share their levels, evenly spaced around 0."""
    for name, (site, weight) in run.sites.items():
        levels = weight.reshape(-1, 8) / site.stages["compact"].scale.reshape(-1, 1)
        assert torch.allclose(levels, levels.round(), atol=1e-4), name
        assert levels.abs().max() < 7.5, name


def has_four_levels_a_group(run: Trained) -> None:
    """Two bits a weight; 8 weights share their levels."""
    for name, (_, weight) in run.sites.items():
        assert all(group.unique().numel() <= 4 for group in weight.reshape(-1, 8)), name


def has_eight_magnitudes_a_block(run: Trained) -> None:
    """Four bits a weight, one of them the sign; 16 weights share a scale."""
    for name, (_, weight) in run.sites.items():
        assert all(block.abs().unique().numel() <= 8 for block in weight.reshape(-1, 16)), name


def trains_the_first_half_of_neurons(run: Trained) -> None:
    """No sub-model has the other half: weight decay alone moves what gets no gradient."""
    for name in (name for name in run.after if name.endswith(("gate_proj.weight", "up_proj.weight"))):
        ratio = run.after[name][24:] / run.before[name][24:]
        torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-5, atol=0)
        assert not torch.equal(run.after[name][:24], run.before[name][:24] * ratio.median())


def trains_in_orthonormal_subspaces(run: Trained) -> None:
    """Vectors of a subspace are orthonormal, and what two of them trained is of twice their rank."""
    for name, (_, weight) in run.sites.items():
        basis = run.after[f"{name}.stages.delta.basis"]
        basis = basis if basis.shape[-2] > basis.shape[-1] else basis.mT
        assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[-1]), atol=1e-5), name
        if len(run.names) == 1:
            moved = torch.linalg.svdvals(weight - run.before[f"{name}.weight"])
            assert moved[0] > 0, name
            assert (moved[8:] <= 1e-4 * moved[0]).all(), name


_OWN = ("lora_", ".stages.", ".around.")
TRAINS: dict[str, tuple[str, ...]] = {
    "lora": _OWN,
    "lora_branch": _OWN,
    "second_lora": _OWN,
    "peft_ranks": (*_OWN, "rank_lora_"),
    "peft_nested": (*_OWN, "rank_lora_"),
    "peft_routed": _OWN,
    "peft_bottleneck": (*_OWN, "bottleneck_"),
    "mask_llm": _OWN,
    "mask_llm_tied": _OWN,
    "router_tuning": _OWN,
    "peqa": _OWN,
    "welore": (*_OWN, ".up.", ".down.", "norm"),
    "side_unipt": _OWN,
    "side_sherl": _OWN,
    "perp": (*_OWN, "norm", ".bias"),
}
"""Parts of the names of what trains under techniques that freeze the model; under several of them all of these."""
PROMISES: dict[str, tuple[Promise, ...]] = {
    "nm_sparsity": (keeps_two_of_four,),
    "progressive": (keeps_two_of_four,),
    "pulled": (keeps_two_of_four,),
    "bdwp": (keeps_two_of_four,),
    "mask_llm": (keeps_frozen_two_of_four,),
    "static_mask": (keeps_half,),
    "perp": (keeps_half,),
    "rigl": (keeps_as_many, is_zero_outside_its_mask),
    "set": (keeps_as_many, is_zero_outside_its_mask),
    "gradual_pruning": (reaches_its_sparsity, is_zero_outside_its_mask),
    "pruned_by_curvature": (is_zero_outside_its_mask,),
    "lora_prune": (masks_half_of_the_neurons,),
    "ternary": (is_ternary,),
    "bitnet": (is_ternary,),
    "binary": (is_one_magnitude,),
    "paretoq": (is_ternary_by_row,),
    "dual_binary": (has_four_levels_a_group,),
    "fp_quant": (has_eight_magnitudes_a_block,),
    "lsq_row": (has_eight_levels_a_row,),
    "pv_tuning": (has_seven_levels_a_group,),
    "peqa": (has_sixteen_levels_a_group,),
    "galore": (trains_in_orthonormal_subspaces,),
    "matformer": (trains_the_first_half_of_neurons,),
}


def check_promises(run: Trained) -> None:
    """Check those of the run's techniques."""
    parts = {part for name in run.names for part in TRAINS.get(name, ())}
    others = sorted(name for name in run.changed if not any(part in name for part in parts))
    assert not parts or not others, f"the base must stay frozen: {others}"
    for promise in {promise: None for name in run.names for promise in PROMISES.get(name, ())}:
        promise(run)
