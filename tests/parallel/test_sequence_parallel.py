"""Ranks that split tokens between shared matmuls train what one process trains, keep less, and send what is said."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # once here instead of in every forked rank
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanmill.core.errors import ConfigError
from leanmill.parallel.config import DdpEngine, LayoutConfig
from leanmill.parallel.sequence_plan import FAMILIES
from leanmill.recipe.root import Recipe
from tests.distributed import run_ranks
from tests.parallel import tensor_cases as tensors
from tests.parallel.test_tensor_parallel import BOTH, check


SPLIT = LayoutConfig(tp=2, sequence_parallel=True)


def test_two_ranks_split_tokens() -> None:
    """With biases, of which those that are added to split tokens see a part."""
    check("fsdp", 2, num_micro_batches=3, family="llama", recompute="full", fused_loss=True, layout=SPLIT)


SIZES_OF_FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
}
ROUNDS_TO_FP32 = {"gemma2", "gemma3_text"}
"""Their norms do, whatever the dtype of the model."""


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("name", BOTH)
def test_families(name: str, family: str) -> None:
    tolerance = 1e-6 if family in ROUNDS_TO_FP32 else 1e-9
    check(name, 2, family=family, layout=SPLIT, tolerance=tolerance, **SIZES_OF_FAMILIES.get(family, {}))


@pytest.mark.slow
@pytest.mark.parametrize("technique", list(tensors.TECHNIQUES))
@pytest.mark.parametrize("name", BOTH)
def test_techniques(name: str, technique: str) -> None:
    check(name, 2, num_micro_batches=3, technique=technique, layout=SPLIT)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", BOTH)
def test_four_ranks(name: str, recompute: str) -> None:
    """Two that share, of two pairs; and four that share."""
    check(name, 4, num_micro_batches=3, family="qwen3", recompute=recompute, layout=SPLIT)
    layout = LayoutConfig(tp=4, sequence_parallel=True)
    sizes = {"num_key_value_heads": 4, "vocab_size": 68}
    check(name, 4, family="qwen3", recompute=recompute, layout=layout, **sizes)
    check(name, 4, family="qwen3", layout=layout, dtype=torch.float32, tolerance=2e-5, **sizes)


@pytest.mark.slow
def test_rows_that_do_not_divide_are_evaluated_and_not_trained() -> None:
    def losses() -> list[float]:
        found = []
        for layout in (SPLIT, LayoutConfig(tp=2)):
            engine = tensors.prepared(DdpEngine(), layout=layout, fused_loss=True)
            ids = torch.arange(14).view(2, 7)
            batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(7).expand(2, 7)}
            found.append(float(engine.evaluate(batch)["total"]))
            if layout is SPLIT:
                with pytest.raises(ConfigError, match=r"rows of 7 tokens cannot be split evenly over layout.tp=2"):
                    engine.forward_backward([batch], torch.tensor(14.0))
            engine.close()
        return found

    for split, whole in run_ranks(losses, 2):
        assert split == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": {"sequence_parallel": True}}, "splits tokens over ranks that share matmuls; set layout.tp"),
        ({"data": {"sequence_length": 127}}, "layout.tp=2 does not divide data.sequence_length=127; set"),
        ({"model": {"config": {"model_type": "gpt_neox"}}}, "has not been shown to hold for model type 'gpt_neox'"),
        (
            {"model": {"config": {"model_type": "phi", "resid_pdrop": 0.1}}},
            "would drop the same places of different tokens by model.config.resid_pdrop=0.1",
        ),
    ],
)
def test_a_recipe_says_what_does_not_go_together(changes: dict[str, Any], message: str) -> None:
    raw: dict[str, Any] = {
        "model": {"config": {"model_type": "llama"}},
        "engine": "ddp",
        "layout": {"tp": 2, "sequence_parallel": True},
        "train": {"steps": 3},
    }
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate({**raw, **changes})
    Recipe.model_validate(raw)


class _Watch(TorchDispatchMode):
    """Notes the memory that is made, and what collectives send (of a ring: a sum is two halves)."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.sent_bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        kind, others = func.__name__.split(".")[0], dist.get_world_size() - 1
        if kind == "allreduce_":
            self.sent_bytes += 2 * args[0][0].nbytes * others / (others + 1)
        elif kind.startswith("reduce_scatter"):
            self.sent_bytes += args[0].nbytes * others / (others + 1)
        elif kind == "allgather_":
            self.sent_bytes += args[1][0].nbytes * others
        return result

    def kept_bytes(self) -> int:
        gc.collect()
        return sum(size for reference, size in self._made.values() if not reference.expired())


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 32, "head_dim": 16}
ROWS, LENGTH = 4, 64


def _measured(*, splits: bool, recompute: str) -> tuple[int, float]:
    """Bytes kept for backward of a micro-batch, and sent in both directions."""
    layout = LayoutConfig(tp=2, sequence_parallel=splits)
    options: dict[str, Any] = {"family": "llama", "dtype": torch.float32, "attention_bias": False, "mlp_bias": False}
    engine: Any = tensors.prepared(DdpEngine(), layout=layout, fused_loss=True, recompute=recompute, **options, **SIZES)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(LENGTH).expand(ROWS, LENGTH)}
    with _Watch() as watch:
        total = engine.module(batch)["total"]
        kept = watch.kept_bytes()
        total.backward()
    engine.close()
    return kept, watch.sent_bytes


def _said_bytes(*, splits: bool, recompute: str) -> float:
    """What docs/guides/tensor-parallelism.md says of a rank, for one micro-batch."""
    layers, tokens, tp = SIZES["num_hidden_layers"], ROWS * LENGTH, 2
    exchange = (tp - 1) / tp * tokens * SIZES["hidden_size"] * 4
    if splits:
        a_layer, outside = {"none": 10, "full": 11}[recompute], 6
    else:
        a_layer, outside = {"none": 14, "full": 16}[recompute], 4
    return (a_layer * layers + outside) * exchange + 3 * 2 * (tp - 1) / tp * tokens * 4


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_less_is_kept_and_as_much_is_sent_as_is_said(recompute: str) -> None:
    def both() -> list[tuple[int, float]]:
        return [_measured(splits=splits, recompute=recompute) for splits in (False, True)]

    ((whole, sent), (split, sent_split)), _ = run_ranks(both, 2)
    # Of each norm what it is given, its normalised form, what it returns, and a number a token; or a block's input.
    hidden = SIZES["hidden_size"]
    of_blocks = SIZES["num_hidden_layers"] * {"none": 6 * hidden + 2, "full": hidden}[recompute] * ROWS * LENGTH * 4
    assert whole - split == pytest.approx(of_blocks / 2, rel=0.02)
    assert sent == pytest.approx(_said_bytes(splits=False, recompute=recompute), rel=0.02)
    assert sent_split == pytest.approx(_said_bytes(splits=True, recompute=recompute), rel=0.02)
