"""Several mask updates under every engine on two ranks: the masks of one process, bit by bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from leanmill.parallel.launch import Ranks
from tests import contract_cases as cases
from tests import contract_training
from tests.distributed import run_ranks


NUM_STEPS = 11
RIGL = {"type": "rigl", "density": 0.3, "update_every_steps": 2, "drop_fraction": 0.5, "update_until": 1.0}
AT_REST = RIGL | {"drop_fraction": 0.0}
VARIANTS = {
    "rigl": [RIGL],
    "set": [RIGL | {"method": "set"}],
    "together": [RIGL | {"scope": "global"}],
    "tied": [RIGL | {"targets": ["*_proj", "embed_tokens", "lm_head"], "distribution": "uniform"}],
    "ternary": [RIGL, {"type": "ternary"}],
    "experts": [RIGL],
}
CASES = {"ddp": ["rigl"], "fsdp": [*VARIANTS], "zero2": ["tied", "set"], "zero3": ["rigl", "experts"]}
"""The contract trains every engine through fewer updates."""
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


class Repeated(contract_training.FixedRows):
    """The contract's rows over and over."""

    def next_rows(self, num_rows, *, rank, world_size):
        self.position_tokens %= self.ids.numel()
        return super().next_rows(num_rows, rank=rank, world_size=world_size)


def _train(engine, variant, optimizer):
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    recipe = contract_training.recipe_of((), engine, "", world_size)
    techniques = [AT_REST] if variant == "at rest" else VARIANTS[variant]
    raw = recipe.model_dump(mode="json") | {"techniques": techniques, "optimizer": optimizer}
    raw["train"] |= {"steps": NUM_STEPS}
    raw["model"]["config"] |= EXPERTS if variant == "experts" else {}
    trained, _ = contract_training.train(type(recipe).model_validate(raw), ranks, num_steps=NUM_STEPS, data=Repeated())
    parameters = contract_training.full_parameters(trained)
    trained.close()
    return parameters


ADAMW = {"type": "adamw", "lr": 1e-2, "eps": 1e-3}
LOOKAHEAD = ADAMW | {"lookahead": {"every": 3}}


def _all(engine, names):
    return {name: _train(engine, name, LOOKAHEAD if name == "set" else ADAMW) for name in names}


@pytest.fixture(scope="module")
def single():
    return _all({"type": "single"}, VARIANTS)


@pytest.mark.xdist_group("rigl")
@pytest.mark.parametrize("engine", CASES)
def test_two_ranks_move_the_masks_of_one_process(engine, single):
    for results in run_ranks(_all, 2, cases.ENGINES[engine], CASES[engine]):
        for variant, parameters in results.items():
            for name, value in single[variant].items():
                got = parameters[name]
                if value.dtype == torch.bool:
                    assert torch.equal(got, value), (variant, name)
                else:
                    torch.testing.assert_close(got, value, rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.xdist_group("rigl")
def test_masks_have_moved_and_counts_have_not(single):
    for variant in VARIANTS:
        for name, mask in single[variant].items():
            if mask.dtype == torch.bool:
                owner = name.removesuffix(".stages.mask.mask")
                weight = single[variant].get(f"{owner}.weight", single[variant].get(owner.replace("sites.", "")))
                assert (weight[~mask] == 0).all()
    first = _train({"type": "single"}, "at rest", ADAMW)
    later = single["rigl"]
    masks = [name for name, value in later.items() if value.dtype == torch.bool]
    assert all(int(first[name].sum()) == int(later[name].sum()) for name in masks)
    assert sum(not torch.equal(first[name], later[name]) for name in masks) > len(masks) // 2
