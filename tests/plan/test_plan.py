"""The held parts of a plan against the bytes of the tensors that live after a backward at two ranks."""

import gc
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.core.errors import ConfigError
from leanmill.core.rules import StepContext
from leanmill.models.build import build_on_meta
from leanmill.optim.config import Adam8bit, AdamW, Lion, LookaheadConfig
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import DeepSpeedOffload
from leanmill.parallel.launch import Ranks
from leanmill.plan.memory import optimizer_bytes, shard_numel
from leanmill.plan.plan import plan
from leanmill.plan.transient import activation_bytes, logits_bytes
from leanmill.plan.weight import Weight
from leanmill.recipe.root import Recipe
from leanmill.trainer.prepare import prepare
from tests.distributed import run_ranks


def _recipe(engine="auto", **more):
    values = {
        "model": {
            "config": {
                "model_type": "llama",
                "hidden_size": 128,
                "intermediate_size": 344,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 4099,  # odd: the last shard is padded
                "tie_word_embeddings": False,
            }
        },
        "data": {"sequence_length": 32, "tokenizer": {"vocab_size": 4096}},
        "batch": {"tokens_per_step": 128, "tokens_per_micro_batch": 32},
        "train": {"steps": 10, "precision": "bf16"},
        "eval": {"tokens_per_domain": 64},
        "device": "cpu",
        "engine": engine,
    }
    return Recipe.model_validate(values | more)


def _storages():
    """Bytes of every live CPU storage by address."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu":
            if torch._C._functorch.is_functorch_wrapped_tensor(thing):
                continue  # left over from a mask built under vmap; it has no storage of its own
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _held_after_backward(recipe):
    rank, world_size = dist.get_rank(), dist.get_world_size()
    before = _storages()
    model = build_on_meta(recipe.model, device_type="cpu")
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=rank, device=torch.device("cpu"))
    engine, _ = build_engine(recipe.engine, ranks=ranks, precision="bf16", model_bytes=1, layout=recipe.layout)
    rules = prepare(recipe, model, engine, num_micro_batches=2).techniques.step_rules
    ids = torch.arange(32)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids}
    for step in range(2):  # optimizer state exists from the first step on
        for rule in rules:
            rule.begin_step(StepContext(step=step, num_steps=2, num_micro_batches=2))
        engine.forward_backward([batch, batch], torch.tensor(128.0))
        engine.clip(1.0)
        if step == 0:
            engine.step(torch.tensor(False))
    for parameter in engine.module.parameters():
        _ = parameter.grad  # gradients that only C++ holds so far become visible
    gc.collect()
    return min(_held(before) for _ in range(5))


def _held(before):
    """Bytes that are there now and were not before; asked several times, the least of them counts.

    A thread of gloo lets go of the tensor it reduced a moment after whoever waited for it went on.
    """
    time.sleep(0.05)
    return sum(size for address, size in _storages().items() if address not in before)


ENGINES = {
    "ddp": {"type": "ddp"},
    "fsdp": {"type": "fsdp"},
    "zero0": {"type": "deepspeed", "stage": 0},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3},
}


@pytest.mark.parametrize("name", ENGINES)
def test_held_memory_is_within_a_tenth_of_live_tensors(name):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    recipe = _recipe(ENGINES[name])
    measured = run_ranks(_held_after_backward, 2, recipe)
    assert plan(recipe, 2).held_bytes == pytest.approx(max(measured), rel=0.1)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_held_memory_of_layers_that_take_turns(name):
    recipe = _recipe(ENGINES[name], techniques=[{"type": "lisa", "num_layers": 1, "every_steps": 1}])
    result = plan(recipe, 2)
    assert result.held_bytes == pytest.approx(max(run_ranks(_held_after_backward, 2, recipe)), rel=0.1)
    full = plan(_recipe(ENGINES[name]), 2)
    assert result.held_bytes < 0.9 * full.held_bytes
    assert result.flops_per_token == full.flops_per_token
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 344 + 2 * 128
    assert full.num_trainable - result.num_trainable == 2 * layer


MIXTURE = {
    "config": {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
}
NUM_IN_EXPERTS = 2 * 8 * 3 * 64 * 96


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"])
def test_held_memory_where_ranks_share_experts(name):
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    data = {"sequence_length": 32, "tokenizer": {"vocab_size": 512}}
    recipe = _recipe(ENGINES[name], model=MIXTURE, layout={"ep": 2}, data=data)
    measured = run_ranks(_held_after_backward, 4, recipe)
    assert plan(recipe, 4).held_bytes == pytest.approx(max(measured), rel=0.1)


def test_a_rank_holds_its_experts():
    data = {"sequence_length": 32, "tokenizer": {"vocab_size": 512}}

    def held(engine, ep):
        result = plan(_recipe(engine, model=MIXTURE, layout={"ep": ep}, data=data), 4)
        return result.memory.held, result.num_parameters, set(result.alternatives)

    alone, num_parameters, _ = held("ddp", 1)
    shared, same_number, others = held("ddp", 4)
    assert same_number == num_parameters
    assert alone["weights"] - shared["weights"] == 4 * NUM_IN_EXPERTS * 3 // 4
    assert alone["optimizer state"] - shared["optimizer state"] == 8 * NUM_IN_EXPERTS * 3 // 4
    assert others == {"ddp", "fsdp", *(f"deepspeed ZeRO-{stage}" for stage in range(4))}
    sharded = plan(_recipe("ddp", model=MIXTURE, layout={"experts": "fully_sharded"}, data=data), 4)
    assert set(sharded.alternatives) == {"ddp", "fsdp"}
    assert sharded.memory.held == shared
    assert (
        sharded.memory.transient["fetched experts"] == 2 * 2 * NUM_IN_EXPERTS // 2
    )  # one layer's, and gradients, bf16
    kept = {"experts": {"rematerialise": False}}
    kept_plan = plan(_recipe("ddp", model=MIXTURE, layout=kept, data=data), 4)
    assert kept_plan.memory.transient["fetched experts"] == 2 * NUM_IN_EXPERTS * 3 // 2  # both layers', one's gradients
    # What is sharded over all ranks is so however experts are spread.
    for engine in ("fsdp", {"type": "deepspeed", "stage": 2}):
        for part in ("gradients", "optimizer state"):
            assert held(engine, 2)[0][part] == pytest.approx(held(engine, 1)[0][part], rel=1e-3)


def test_numbers_of_a_dense_run_written_out():
    result = plan(_recipe("single", data={"sequence_length": 32, "tokenizer": {"vocab_size": 4099}}))
    layer = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 344 + 2 * 128
    parameters = 3 * layer + 128 + 2 * 4099 * 128
    assert result.num_parameters == result.num_trainable == result.num_active == parameters
    assert result.memory.held == {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer state": 8 * parameters,
    }
    assert result.held_bytes == 16 * parameters
    assert (result.num_micro_batches, result.num_steps, result.total_tokens) == (4, 10, 1280)
    assert result.flops_per_step == result.flops_per_token * 128
    assert result.total_flops == result.flops_per_step * 10


def test_frozen_base_costs_no_gradients_or_state():
    full = plan(_recipe("single"))
    lora = plan(_recipe("single", techniques=[{"type": "lora", "rank": 4}]))
    norms = 7 * 128
    assert lora.memory.held["frozen weights"] == (full.memory.held["weights"] + 4 * norms) // 2
    exact = plan(_recipe("single", model=lora_model("fp32"), techniques=[{"type": "lora", "rank": 4}]))
    assert exact.memory.held["frozen weights"] == full.memory.held["weights"]
    assert lora.memory.held["gradients"] == 4 * lora.num_trainable < full.memory.held["gradients"] / 10
    assert lora.num_technique == lora.num_trainable
    assert lora.flops_per_token == full.flops_per_token


def lora_model(frozen_dtype):
    return {**_recipe().model.model_dump(exclude_unset=True), "frozen_dtype": frozen_dtype}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fsdp", "nf4"),
        *(pytest.param(name, "int8", marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero3")),
        pytest.param("fsdp", "bf16", marks=pytest.mark.slow),
    ],
)
def test_held_memory_of_compact_frozen_weights(name, kind):
    recipe = _recipe(ENGINES[name], model=lora_model(kind), techniques=[{"type": "lora", "rank": 4}])
    measured = run_ranks(_held_after_backward, 2, recipe)
    assert plan(recipe, 2).held_bytes == pytest.approx(max(measured), rel=0.1)


def test_compact_frozen_weights_by_formula():
    result = plan(_recipe("single", model=lora_model("nf4"), techniques=[{"type": "lora", "rank": 4}]))
    rows = {128: [128, 64, 64, 128, 344, 344], 344: [128]}
    layers = 3 * sum(out * (-(-num_in // 2) + 4 * -(-num_in // 64)) for num_in, outs in rows.items() for out in outs)
    assert result.memory.held["frozen weights"] == layers + 2 * 2 * 4099 * 128 + 4 * 7 * 128
    assert result.memory.transient["decoded weights"] == 4 * 344 * 128


def test_offload_moves_state_to_the_host():
    offloaded = plan(_recipe({"type": "fsdp", "cpu_offload": True}), 2)
    assert offloaded.memory.held == {}
    assert offloaded.host_bytes == plan(_recipe({"type": "fsdp"}), 2).held_bytes
    zero = {"type": "deepspeed", "stage": 2}
    moved = plan(_recipe(zero | {"offload_optimizer": DeepSpeedOffload(device="cpu").model_dump()}), 2)
    assert set(moved.memory.host) == {"master weights", "gradients", "optimizer state"}
    assert moved.held_bytes + moved.host_bytes == plan(_recipe(zero), 2).held_bytes


def test_more_ranks_hold_less_only_where_state_is_sharded():
    held = {n: plan(_recipe("ddp"), n).alternatives for n in (2, 4)}
    sizes = {n: {name: sum(m.held.values()) for name, m in table.items()} for n, table in held.items()}
    assert sizes[2]["ddp"] == sizes[4]["ddp"]
    for name in ("fsdp", "deepspeed ZeRO-1", "deepspeed ZeRO-2", "deepspeed ZeRO-3"):
        assert sizes[4][name] < sizes[2][name]


def test_hybrid_sharding_counts_by_its_shard_size():
    hybrid = plan(_recipe({"type": "fsdp", "shard_size": 2}), 4)
    assert hybrid.held_bytes == plan(_recipe("fsdp"), 2).held_bytes


@pytest.mark.parametrize(("rows", "ranks", "expected"), [(8, 2, 4), (7, 2, 4), (3, 4, 1), (5, 4, 2)])
def test_shards_are_whole_rows_with_padding(rows, ranks, expected):
    assert shard_numel(Weight((rows, 6), 4, True, None), ranks) == expected * 6


@pytest.mark.parametrize(
    ("optimizer", "num_bytes"),
    [
        (AdamW(), 8 * 8192),
        (Lion(), 4 * 8192),
        (Lion(lookahead=LookaheadConfig()), 8 * 8192),
        (Adam8bit(), 2 * 8192 + 2 * 4 * 8192 / 256),
    ],
)
def test_optimizer_state_by_kind(optimizer, num_bytes):
    assert optimizer_bytes(optimizer, [8192]) == num_bytes


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp", 2), ("deepspeed", 2)])
def test_a_pull_takes_four_bytes_a_weight(engine, ranks):
    found = []
    for decay_on in ("gradient", "update"):
        masks = {"type": "nm_sparsity", "decay_on": decay_on, "targets": ["*_proj"]}
        found.append(plan(_recipe(engine, techniques=[masks]), ranks).memory.held["optimizer state"])
    model = build_on_meta(_recipe().model)
    pulled = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    assert found[1] - found[0] == 4 * pulled // ranks


def test_small_parameters_stay_fp32_under_8_bit_adam():
    assert optimizer_bytes(Adam8bit(), [4095]) == 8 * 4095


def test_recomputation_and_chunking_shrink_what_they_should():
    config = build_on_meta(_recipe().model).config
    sizes = [
        activation_bytes(
            _recipe(train={"steps": 1, "activation_checkpointing": mode}), config, [1.0] * config.num_hidden_layers
        )
        for mode in ("none", "selective", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    chunked = _recipe(train={"steps": 1, "precision": "bf16", "logits_chunk_tokens": 8})
    assert logits_bytes(chunked, 100, 16) == 8 * 100 * 2 + 4 * 100 * 16


def test_recomputation_keeps_what_came_from_other_ranks():
    def activations(mode, **layout):
        recipe = _recipe("ddp", model=MIXTURE, layout=layout, train={"steps": 1, "activation_checkpointing": mode})
        config = build_on_meta(recipe.model).config
        return activation_bytes(recipe, config, [1.0] * config.num_hidden_layers)

    # 2 of 8 experts, 4 of them here: 1 - (4 x 3) / (8 x 7) of the tokens need each of the two ranks.
    rows = 2 * (1 - 12 / 56)
    expected = 2 * 32 * rows * (2 * 4 * MIXTURE["config"]["hidden_size"] + 8 * 2)
    assert activations("full", ep=2) - activations("full") == pytest.approx(expected, abs=1)
    assert activations("full", ep=2, expert_resend=True) == activations("full")


def test_what_blocks_leave_out_is_not_counted():
    whole = plan(_recipe())
    part = plan(_recipe(techniques=[{"type": "mixture_of_depths", "layers": [0, 2], "capacity": 0.25}]))
    config = build_on_meta(_recipe().model).config
    block = 4 * 128 * 128 - 2 * 64 * 128 + 3 * 128 * 344
    pairs = 12 * config.hidden_size * 32
    left_out = 6 * block * 2 * 0.75 + pairs * 2 * (1 - 0.25**2)
    assert part.flops_per_token == pytest.approx(whole.flops_per_token - left_out)
    assert part.memory.transient["activations"] == pytest.approx(whole.memory.transient["activations"] / 2, rel=1e-6)


def test_further_tokens_are_counted():
    whole = plan(_recipe(), 2)
    deep = plan(_recipe(techniques=[{"type": "multi_token", "depth": 2}]), 2)
    block = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 344
    each = 6 * (block + 2 * 128 * 128 + 4099 * 128) + 12 * 128 * 32
    assert deep.flops_per_token == pytest.approx(whole.flops_per_token + 2 * each)
    assert deep.num_technique == 2 * (block + 2 * 128 * 128 + (2 + 3) * 128)
    assert deep.num_active == whole.num_active
    assert deep.memory.transient["logits"] == whole.memory.transient["logits"] + 2 * 4 * 4099 * 128
    kept, between = whole.memory.transient["activations"] / 3, 32 * 128 * (2 * 4 + 4 * 6)
    assert deep.memory.transient["activations"] == pytest.approx(
        whole.memory.transient["activations"] + 2 * (kept + between)
    )


def test_held_memory_of_further_tokens():
    recipe = _recipe(ENGINES["fsdp"], techniques=[{"type": "multi_token"}])
    measured = run_ranks(_held_after_backward, 2, recipe)
    assert plan(recipe, 2).held_bytes == pytest.approx(max(measured), rel=0.1)


def test_auto_is_decided_by_the_memory_of_a_rank():
    assert plan(_recipe(), 2).engine == "ddp"
    assert plan(_recipe(), 2, rank_memory_gib=0.01).engine == "fsdp"
    assert plan(_recipe()).engine == "single"


@pytest.mark.parametrize(
    ("engine", "world_size", "message"),
    [
        ("auto", 3, "batch.tokens_per_step=128 is no multiple"),
        ("single", 2, "engine=single runs one process"),
        ({"type": "fsdp", "shard_size": 3}, 4, "shard_size=3 does not divide 4 ranks"),
    ],
)
def test_what_cannot_run_is_refused(engine, world_size, message):
    with pytest.raises(ConfigError, match=message):
        plan(_recipe(engine), world_size)


def test_json_holds_the_totals():
    import json

    result = plan(_recipe("ddp"), 2, 1)
    values = json.loads(json.dumps(result.to_json()))
    assert values["num_nodes"] == 2
    assert values["held_bytes"] == result.held_bytes == sum(values["memory"]["held"].values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_of_weights_that_are_staged_once_a_step(precision):
    def memory(engine, world_size, **technique):
        techniques = [{"type": "ternary", **technique}]
        train = {"steps": 10, "precision": precision}
        return plan(_recipe(engine, techniques=techniques, train=train), world_size).memory.transient

    in_blocks = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 344 * 128)
    size = 2 if precision == "bf16" else 4
    once, at_use = memory("single", 1), memory({"type": "single", "staging": "per_use"}, 1)
    assert once["staged weights"] == size * in_blocks
    assert "staged weights" not in at_use
    # In the place of autocast's own copies, or beside the weights.
    assert once.get("bf16 copies", 0) == at_use.get("bf16 copies", 0) - (2 * in_blocks if precision == "bf16" else 0)
    shards, at_use = memory("fsdp", 2), memory({"type": "fsdp", "staging": "per_use"}, 2)
    assert shards["staged weights"] == size * in_blocks / 2
    assert (shards["gathered weights"] < at_use["gathered weights"]) == (precision == "bf16")
    # Its scale takes a sort of the whole weight.
    assert "staged weights" not in memory("fsdp", 2, scale="mse")
    assert memory("ddp", 2, scale="mse")["staged weights"] == size * in_blocks


def test_auto_counts_no_copies_that_do_not_fit():
    recipe = _recipe("single", techniques=[{"type": "ternary"}], train={"steps": 10, "precision": "fp32"})
    assert "staged weights" in plan(recipe, rank_memory_gib=1).memory.transient
    small = plan(recipe, rank_memory_gib=0.01)
    assert "staged weights" not in small.memory.transient


def test_what_workers_keep_to_meet_by():
    layout = {"low_comm": {"type": "diloco", "workers": 2}}
    alone, (worker, sharded) = plan(_recipe("single")), (plan(_recipe(e, layout=layout), 4) for e in ("ddp", "fsdp"))
    weights = sum(num_bytes for name, num_bytes in alone.memory.held.items() if name in ("weights", "embeddings"))
    assert worker.memory.held["outer optimizer state"] == 2 * weights > 0
    assert sharded.memory.held["outer optimizer state"] == pytest.approx(weights, rel=0.01)
    assert set(worker.alternatives) == {"ddp", "fsdp"}
