"""Changing which parameters train: equal to one process and to AdamW written out, and memory really freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, SingleEngine
from leanmill.parallel.engine import Engine
from leanmill.parallel.tensors import full, local
from tests.distributed import run_ranks
from tests.parallel import cases


SHARDED = {
    "ddp": DdpEngine(),
    "fsdp": FsdpEngine(),
    "fsdp, gathered once": FsdpEngine(reshard_after_forward=False),
    "fsdp, offloaded": FsdpEngine(cpu_offload=True),
}
LAYERS = [{0}, {1}, {1}, {0, 1}, {0}, set()]
"""Which layers train in each step beside what lies outside of them."""


def prepared(
    config: EngineConfig, make_optimizer: Callable[[nn.Module], Any] = cases.adamw, precision: str = "fp32"
) -> Engine:
    engine, _ = build_engine(config, ranks=cases.ranks_here(), precision=precision, model_bytes=0)
    engine.prepare(cases.make_module(torch.float32), cases.preparation(make_optimizer))
    return engine


def trainable(model: nn.Module, layers: set[int], *, embedding: bool = True) -> set[str]:
    """Names of what may train outside of all layers and in these."""
    frozen = {"model.layers.1.input_layernorm.weight"}
    names = {name for name, p in model.named_parameters() if p.dtype != torch.bool and name not in frozen}
    if not embedding:
        names.discard("model.embed_tokens.weight")
    return {name for name in names if ".layers." not in name or any(f".layers.{n}." in name for n in layers)}


def train(engine: Engine, *, embedding: bool = True, steps: range = range(len(LAYERS))) -> None:
    for step in steps:
        engine.set_trainable(trainable(engine.module.model, LAYERS[step], embedding=embedding))
        cases.train(engine, num_steps=1, first=step)


def results(engine: Engine) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return cases.full_weights(engine), {n: full(v).clone() for n, v in engine.optimizer_state().items()}


def written_out() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """AdamW in plain tensor code; what does not train has no state, and starts from none."""
    module = cases.make_module(torch.float32)
    cases.materialise(module)
    parameters = dict(module.model.named_parameters())
    state: dict[str, tuple[int, Tensor, Tensor]] = {}
    for step, layers in enumerate(LAYERS):
        names = trainable(module.model, layers)
        batch = cases.rows(step)
        loss = module(batch)["total"] / (batch["labels"] != -100).sum()
        wanted = [name for name in parameters if name in names]
        found = dict(zip(wanted, torch.autograd.grad(loss, [parameters[n] for n in wanted]), strict=True))
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        state = {name: kept for name, kept in state.items() if name in names}
        for name, gradient in found.items():
            g = gradient * min(1.0, 0.4 / float(norm))
            count, m, v = state.get(name, (0, torch.zeros_like(g), torch.zeros_like(g)))
            count, m, v = count + 1, 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            state[name] = count, m, v
            with torch.no_grad():
                p = parameters[name]
                p.mul_(1 - 1e-2 * 0.1)
                p.sub_(1e-2 * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8))
    flat = {}
    for name, (count, m, v) in state.items():
        flat |= {f"{name}/step": torch.tensor(float(count)), f"{name}/exp_avg": m, f"{name}/exp_avg_sq": v}
    return {name: p.detach() for name, p in parameters.items()}, flat


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_one_process_is_adamw_on_what_trains() -> None:
    engine = prepared(SingleEngine())
    train(engine)
    weights, state = results(engine)
    expected_weights, expected_state = written_out()
    close(state, expected_state, atol=1e-6)
    # Adam turns rounding noise in near-zero gradients into steps; lr bounds what that can do.
    close(weights, expected_weights, atol=1e-3)
    differences = torch.cat([(weights[n] - expected_weights[n]).abs().flatten() for n in weights if "mask" not in n])
    assert differences.median() < 1e-6


def smooth(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW whose large eps keeps rounding noise in near-zero gradients from becoming full steps."""
    return cases.adamw(module, eps=1e-3)


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("case", SHARDED)
def test_ranks_equal_one_process(case: str, embedding: bool) -> None:
    def body(config: EngineConfig) -> Any:
        engine = prepared(config, smooth)
        train(engine, embedding=embedding)
        return results(engine)

    weights, state = body(SingleEngine())
    for found_weights, found_state in run_ranks(lambda: body(SHARDED[case]), 2):
        close(found_weights, weights, atol=1e-5)
        close(found_state, state, atol=1e-6)


def test_a_group_that_rests_at_first_reduces_in_fp32_later() -> None:
    """FSDP2 derives a group's dtypes from what trains at its first forward."""

    def body() -> tuple[set[torch.dtype], bool]:
        engine = prepared(FsdpEngine(), precision="bf16")
        dtypes = set()
        for step in range(2):
            engine.set_trainable(trainable(engine.module.model, {step}))
            micro_batches, num_valid = cases.share_of(engine, step)
            engine.forward_backward(micro_batches, num_valid)
            dtypes |= {g.dtype for _, g in engine.gradients()}
            engine.step(torch.tensor(False))
        return dtypes, all(torch.isfinite(v).all() for v in cases.full_weights(engine).values())

    assert run_ranks(body, 2) == [({torch.float32}, True)] * 2


def live_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each once."""
    storages = {s.data_ptr(): s.nbytes() for s in (local(t).untyped_storage() for t in tensors)}
    return sum(storages.values())


@pytest.mark.parametrize("case", ["single", "ddp", "fsdp"])
def test_gradients_and_state_of_what_rests_are_freed(case: str) -> None:
    def body(config: EngineConfig) -> None:
        engine = prepared(config)
        model = engine.module.model
        watched: list[weakref.ref[Tensor]] = []
        for step, layers in enumerate(({0, 1}, {0}, {1})):
            before = engine.__dict__.get("_replica")
            replica = None if before is None else weakref.ref(before)
            del before
            engine.set_trainable(trainable(model, layers))
            assert replica is None or replica() is None, "the old buckets are held"
            assert not [ref for ref in watched if ref() is not None], "state of what rests is held"
            micro_batches, num_valid = cases.share_of(engine, step)
            engine.forward_backward(micro_batches, num_valid)
            names = trainable(model, layers)
            by_name = dict(model.named_parameters())
            trained = sum(local(by_name[name]).numel() * 4 for name in names)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            assert {name for name, p in by_name.items() if p.grad is not None} == names
            assert live_bytes(gradients) <= 1.01 * trained + 64 * len(gradients)
            engine.step(torch.tensor(False))
            state = [v for entry in engine.optimizer.state.values() for v in entry.values() if v.dim()]
            assert len(engine.optimizer.state) == len(names)
            assert sum(local(v).numel() * 4 for v in state) == 2 * trained
            next_layers = ({0}, {1}, {1})[step]
            resting = names - trainable(model, next_layers)
            watched = [weakref.ref(v) for n in resting for v in engine.optimizer.state[by_name[n]].values() if v.dim()]
            del gradients, state

    gc.collect()
    if case == "single":
        body(SingleEngine())
    else:
        run_ranks(lambda: body(SHARDED[case]), 2)


def test_saved_on_two_ranks_in_the_middle_loads_on_one() -> None:
    def body() -> Any:
        engine = prepared(FsdpEngine(), smooth)
        train(engine, steps=range(2))
        halfway = {n: full(v).clone() for n, v in engine.model_state().items()}, results(engine)[1]
        train(engine, steps=range(2, len(LAYERS)))
        return halfway, results(engine)

    (model_state, optimizer_state), (weights, state) = run_ranks(body, 2)[0]
    single = prepared(SingleEngine(), smooth)
    single.set_trainable({name.rpartition("/")[0] for name in optimizer_state})
    assert single.optimizer_state().keys() == optimizer_state.keys()
    single.load_model_state(model_state)
    single.load_optimizer_state(optimizer_state)
    train(single, steps=range(2, len(LAYERS)))
    found_weights, found_state = results(single)
    close(found_weights, weights, atol=1e-5)
    close(found_state, state, atol=1e-6)


def test_only_what_the_optimizer_was_made_for_can_train() -> None:
    engine = prepared(SingleEngine())
    for name in ("model.layers.1.input_layernorm.weight", "model.layers.0.mlp.down_proj.mask", "no_such"):
        with pytest.raises(KeyError, match=name):
            engine.set_trainable({name})


def test_deepspeed_trains_a_fixed_set() -> None:
    from leanmill.parallel.deepspeed import DeepSpeedEngine

    engine = DeepSpeedEngine.__new__(DeepSpeedEngine)
    engine.module = cases.make_module()
    engine.set_trainable(trainable(engine.module.model, {0, 1}))
    with pytest.raises(ConfigError, match="the set is fixed; type engine=fsdp"):
        engine.set_trainable(trainable(engine.module.model, {0}))
