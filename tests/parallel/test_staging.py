"""Weights staged once an optimizer step train as those staged at every use, and are never out of date."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext
from leanmill.core.sites import iter_sites
from leanmill.core.stage import Slot
from leanmill.parallel.staging import extra_bytes, fits
from leanmill.recipe.root import Recipe
from tests.contract_models import NUM_STEPS
from tests.contract_training import FixedRows, full_parameters, recipe_of, train
from tests.distributed import run_ranks
from tests.parallel.cases import ranks_here


EVERYWHERE = ["*_proj", "embed_tokens", "lm_head"]
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "ternary": [{"type": "ternary"}],
    "int_quant": [{"type": "int_quant", "weight_bits": 4}],
    "nm": [{"type": "nm_sparsity", "gradient": "straight_through"}],
    "decay": [{"type": "nm_sparsity", "decay": 1e-2}],
    "lsq": [{"type": "lsq", "weight_bits": 3}],
    "tied": [{"type": "nm_sparsity", "decay": 1e-2, "targets": EVERYWHERE}, {"type": "ternary", "granularity": "row"}],
    "layers in turns": [
        {"type": "lsq", "weight_bits": 3},
        {"type": "lisa", "num_layers": 1, "every_steps": 1},
    ],
    "quest": [{"type": "quest", "weight_bits": 4, "activation_bits": None}],
    "frozen base": [{"type": "ternary"}, {"type": "lora", "rank": 4, "where": "branch"}],
}
BITWISE = ("ternary", "int_quant", "nm", "frozen base")
"""Whose backward works element by element, so that it does not matter whether gradients are added before or after."""


def recipe(
    techniques: list[dict[str, Any]],
    engine: dict[str, Any],
    *,
    world_size: int = 1,
    precision: str = "fp32",
    **train: Any,
) -> Recipe:
    raw = recipe_of((), {"type": "single"}, "", world_size, precision).model_dump()
    return Recipe.model_validate(raw | {"techniques": techniques, "engine": engine, "train": raw["train"] | train})


def trained(wanted: Recipe, num_steps: int = NUM_STEPS) -> tuple[dict[str, Tensor], int]:
    engine, _ = train(wanted, ranks_here(), num_steps=num_steps)
    found = full_parameters(engine)
    num_once = len(engine.staging.weights)  # type: ignore[attr-defined]
    engine.close()
    return found, num_once


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_per_step_trains_like_per_use(name, precision):
    results = {}
    for staging in ("per_step", "per_use"):
        engine = {"type": "single", "staging": staging}
        results[staging], num_once = trained(recipe(TECHNIQUES[name], engine, precision=precision))
        assert num_once == (0 if staging == "per_use" else 15 if name == "tied" else 14)
    for key, value in results["per_use"].items():
        exact = name in BITWISE
        torch.testing.assert_close(
            results["per_step"][key], value, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-6
        )


@pytest.mark.parametrize(
    "options", [{"activation_checkpointing": "full"}, {"compile": True}, {"logits_chunk_tokens": 16}]
)
def test_recomputed_and_compiled_blocks(options, monkeypatch):
    # The graphs and their cuts are what matters here; C++ for them takes minutes.
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    wanted = [recipe(TECHNIQUES["tied"], {"type": "single", "staging": s}, **options) for s in ("per_step", "per_use")]
    once, at_use = (trained(one)[0] for one in wanted)
    for key, value in at_use.items():
        torch.testing.assert_close(once[key], value, rtol=1e-4, atol=1e-6)


def loss_of(engine: Any) -> float:
    return float(engine.evaluate(FixedRows().next_rows(2, rank=0, world_size=1))["cross_entropy"])


def fresh_loss(engine: Any) -> float:
    """The same without anything staged ahead."""
    staging, engine.staging = engine.staging, type(engine.staging)((), engine.precision)
    try:
        return loss_of(engine)
    finally:
        engine.staging = staging


@pytest.fixture
def lsq_engine():
    engine, loop = train(
        recipe(TECHNIQUES["lsq"], {"type": "single", "staging": "per_step"}), ranks_here(), num_steps=1
    )
    return engine, loop


def test_evaluation_sees_what_was_written(lsq_engine):
    engine, loop = lsq_engine
    seen = [loss_of(engine)]
    assert seen[0] == fresh_loss(engine)
    _, site = next(iter_sites(engine.module.model))

    def write_weight() -> None:
        with torch.no_grad():
            site.raw_weight.mul_(3.0)

    def write_step_size() -> None:
        with torch.no_grad():
            site.stage(Slot.QUANT).scale.mul_(2.0)

    def load() -> None:
        state = {name: value.clone() for name, value in engine.model_state().items()}
        name = next(name for name in state if name.endswith("v_proj.weight"))
        state[name].mul_(5.0)
        engine.load_model_state(state)

    for write in (loop.train_step, write_weight, write_step_size, load, loop.train_step):
        write()
        loop.step += write is loop.train_step
        seen.append(loss_of(engine))
        assert seen[-1] == fresh_loss(engine), write
    assert len(set(seen)) == len(seen)


def test_evaluation_stages_once_until_something_changes(lsq_engine, monkeypatch):
    engine, loop = lsq_engine
    calls = []
    stage = type(engine.staging)._stage
    monkeypatch.setattr(
        type(engine.staging), "_stage", lambda self, **options: (calls.append(options), stage(self, **options))
    )
    for _ in range(3):
        loss_of(engine)
    assert len(calls) == 1
    loop.train_step()
    loss_of(engine)
    assert len(calls) == 3


def test_nothing_is_held_between_steps(lsq_engine):
    engine, _ = lsq_engine
    assert all(site.held is None for _, site in iter_sites(engine.module.model))
    assert engine.staging._held == []
    assert engine.staging._tapes == []


def test_a_weight_changed_in_the_middle_of_a_step_is_refused(lsq_engine):
    engine, _ = lsq_engine
    engine.staging.begin()
    weight = engine.staging.weights[0].raw
    with torch.no_grad():
        weight.add_(1.0)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        engine.staging.finish()


def test_scheduled_buffers_are_read_at_the_start_of_a_step():
    wanted = recipe(TECHNIQUES["decay"], {"type": "single", "staging": "per_step"})
    engine, loop = train(wanted, ranks_here(), num_steps=1)
    loss_of(engine)
    stage = next(iter_sites(engine.module.model))[1].stage(Slot.MASK)
    for rule in loop.step_rules:
        rule.begin_step(StepContext(step=1, num_steps=3, num_micro_batches=2))
    before = float(stage.decay_left)
    loop.train_step()
    assert before > 0
    assert float(stage.decay_left) == 0, "the one backward of the step spends it"


def test_per_step_is_refused_where_a_technique_stages_at_use():
    wanted = recipe([{"type": "lora", "rank": 2}], {"type": "single", "staging": "per_step"})
    with pytest.raises(ConfigError, match=r"engine.staging=per_step cannot stage .*q_proj once a step: lora"):
        train(wanted, ranks_here(), num_steps=0)


def test_zero_refuses_per_step_when_it_is_read():
    with pytest.raises(ValueError, match="set engine.staging=per_use, or type engine=fsdp"):
        recipe([], {"type": "deepspeed", "staging": "per_step"})


def test_packed_gathers_need_something_to_pack():
    with pytest.raises(ValueError, match="set engine.staging=per_step, or engine.gather=full"):
        recipe([], {"type": "fsdp", "gather": "packed", "staging": "per_use"})
    wanted = recipe(TECHNIQUES["lsq"], {"type": "fsdp", "gather": "packed"})

    def on_rank() -> str:
        with pytest.raises(ConfigError) as refused:
            train(wanted, ranks_here(), num_steps=0)
        return str(refused.value)

    assert "no weight here is staged once a step into a form that packs" in run_ranks(on_rank, 1)[0]


def test_auto_stages_at_use_where_copies_are_large(monkeypatch):
    monkeypatch.setattr("leanmill.parallel.torch_engine.smallest_rank_memory", lambda ranks: 100_000)
    found = {}
    for precision in ("fp32", "bf16"):
        engine, _ = train(
            recipe(TECHNIQUES["ternary"], {"type": "single"}, precision=precision), ranks_here(), num_steps=0
        )
        found[precision] = len(engine.staging.weights), engine.notes[0]
    assert found["fp32"][0] == 0
    assert "at every use, since copies of" in found["fp32"][1]
    # Autocast holds a copy itself.
    assert found["bf16"] == (14, "staging: 14 weights once a step")


@pytest.mark.parametrize(
    ("precision", "is_table", "num_shards", "expected"),
    [
        ("fp32", False, None, 400),
        ("bf16", False, None, 0),  # in the place of autocast's copy
        ("bf16", True, None, 400),
        ("fp32", False, 4, 100),
        ("bf16", True, 4, 50),
    ],
)
def test_extra_bytes(precision, is_table, num_shards, expected):
    assert extra_bytes(100, 4, is_table=is_table, precision=precision, num_shards=num_shards) == expected


def test_what_fits():
    assert fits(1, 8)
    assert not fits(1.01, 8)


# On several ranks.

ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"type": "ddp", "staging": "per_step"},
    "ddp at use": {"type": "ddp", "staging": "per_use"},
    "fsdp": {"type": "fsdp", "staging": "per_step"},
    "fsdp at use": {"type": "fsdp", "staging": "per_use"},
    "fsdp packed": {"type": "fsdp", "staging": "per_step", "gather": "packed"},
}
ON_RANKS = ("decay", "ternary", "lsq", "tied", "layers in turns")
NOT_PACKED = ("lsq", "layers in turns")


def on_ranks() -> dict[tuple[str, str, str], dict[str, Tensor]]:
    found = {}
    for precision in ("fp32", "bf16"):
        for name in ON_RANKS:
            for kind, engine in ENGINES.items():
                if (precision == "bf16" and "ddp" in kind) or (name in NOT_PACKED and "packed" in kind):
                    continue
                wanted = recipe(TECHNIQUES[name], engine, world_size=2, precision=precision)
                found[name, kind, precision] = trained(wanted)[0]
    return found


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(on_ranks, 2, timeout_seconds=200)[0]


@pytest.mark.xdist_group("staging on two ranks")
@pytest.mark.parametrize("name", ON_RANKS)
@pytest.mark.parametrize("kind", ENGINES)
def test_two_ranks_equal_one_that_stages_at_use(kind, name, two_ranks):
    if (name, kind, "fp32") not in two_ranks:
        assert name in NOT_PACKED
        assert kind == "fsdp packed"
        return
    expected, _ = trained(recipe(TECHNIQUES[name], {"type": "single", "staging": "per_use"}))
    for key, value in expected.items():
        torch.testing.assert_close(two_ranks[name, kind, "fp32"][key], value, rtol=1e-4, atol=2e-5)


@pytest.mark.xdist_group("staging on two ranks")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["decay", "ternary", "tied"])
def test_packed_gathers_change_no_bit(name, precision, two_ranks):
    full, packed = (two_ranks[name, kind, precision] for kind in ("fsdp", "fsdp packed"))
    assert all(torch.equal(packed[key], value) for key, value in full.items())


@pytest.mark.xdist_group("staging on two ranks")
@pytest.mark.parametrize("name", ["decay", "ternary", "lsq"])
def test_fsdp_in_bf16_trains_alike_once_and_at_use(name, two_ranks):
    once, at_use = (two_ranks[name, kind, "bf16"] for kind in ("fsdp", "fsdp at use"))
    for key, value in at_use.items():
        torch.testing.assert_close(once[key], value, rtol=1e-4, atol=1e-6)


VARIANTS: dict[str, tuple[dict[str, Any], int]] = {
    "hybrid": ({"shard_size": 2}, 4),
    "uneven": ({}, 4),
    "keeps weights": ({"reshard_after_forward": False}, 2),
    "offload": ({"cpu_offload": True}, 2),
    "one rank": ({}, 1),
}


@pytest.mark.parametrize("variant", [pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS])
def test_other_shapes_of_fsdp(variant):
    options, world_size = VARIANTS[variant]
    techniques = [
        {"type": "nm_sparsity", "decay": 1e-2, "targets": EVERYWHERE},
        {"type": "lsq", "weight_bits": 3, "targets": ["*_proj"]},
    ]
    expected, _ = trained(recipe(techniques, {"type": "single", "staging": "per_use"}))
    engine = {"type": "fsdp", "staging": "per_step", "gather": "packed", **options}
    got = run_ranks(lambda: trained(recipe(techniques, engine, world_size=world_size))[0], world_size)[0]
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-4, atol=2e-5)


def gathered_bytes(wanted: Recipe) -> int:
    """Bytes that this rank puts into the all-gathers of one forward, all but what the plain model's norms put in."""
    import torch.distributed as dist

    engine, _ = train(wanted, ranks_here(), num_steps=1)
    name = next(n for n in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, n))
    real, sent = getattr(dist, name), []

    def counted(output_tensor: Tensor, input_tensor: Tensor, *rest: Any, **options: Any) -> Any:
        sent.append(input_tensor.nbytes)
        return real(output_tensor, input_tensor, *rest, **options)

    setattr(dist, name, counted)
    try:
        engine.evaluate(FixedRows().next_rows(2, rank=0, world_size=1))
    finally:
        setattr(dist, name, real)
    return sum(sent)


def test_bytes_of_packed_gathers():
    def on_rank() -> dict[str, float]:
        shares = {}
        for name in ("ternary", "nm"):
            (technique,) = TECHNIQUES[name]
            sizes = []
            for gather in ("full", "packed"):
                engine = {"type": "fsdp", "staging": "per_step", "gather": gather}
                raw = recipe([technique | {"targets": EVERYWHERE}], engine, world_size=2, precision="bf16").model_dump()
                raw["model"]["config"] |= {"hidden_size": 320, "intermediate_size": 864, "num_attention_heads": 5}
                sizes.append(gathered_bytes(Recipe.model_validate(raw)))
            norms = 2 * 5 * 320 // 2  # bf16, half of them on a rank
            shares[name] = (sizes[1] - norms) / (sizes[0] - norms)
        return shares

    shares = run_ranks(on_rank, 2)[0]
    assert shares["ternary"] <= 0.135
    assert shares["nm"] <= 0.57
