"""Skipping, clipping, evaluation and state of the torch-native engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from leanmill.core.errors import RunError
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import DdpEngine, EngineConfig, FsdpEngine, SingleEngine
from leanmill.parallel.engine import Engine
from leanmill.parallel.tensors import local
from tests.distributed import run_ranks
from tests.parallel import cases


ENGINES = {"single": (SingleEngine(), 1), "ddp": (DdpEngine(), 2), "fsdp": (FsdpEngine(), 2)}


def prepared(config: EngineConfig, make_optimizer: Callable[[nn.Module], Any] = cases.adamw) -> Engine:
    engine, _ = build_engine(config, ranks=cases.ranks_here(), precision="fp32", model_bytes=0)
    engine.prepare(cases.make_module(torch.float32), cases.preparation(make_optimizer))
    return engine


def run(case: str, body: Callable[[EngineConfig], Any]) -> list[Any]:
    config, world_size = ENGINES[case]
    return [body(config)] if case == "single" else run_ranks(lambda: body(config), world_size)


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full copies of a state, whole on every rank."""
    return {n: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for n, v in state.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def fused(module: nn.Module) -> torch.optim.Optimizer:
    return cases.adamw(module, foreach=None, fused=True)


def lion(module: nn.Module) -> torch.optim.Optimizer:
    from leanmill.optim.lion import Lion

    return Lion([p for p in module.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)


def lookahead(module: nn.Module) -> torch.optim.Optimizer:
    from leanmill.optim.lookahead import Lookahead

    return Lookahead(fused(module), every=2)


OPTIMIZERS = {"adamw": cases.adamw, "fused": fused, "lion": lion, "lookahead": lookahead}
# DDP's optimizer is the single engine's, so one is enough there.
PAIRS = [
    *(("single", name) for name in OPTIMIZERS),
    ("ddp", "fused"),
    *(("fsdp", name) for name in ("fused", "lion", "lookahead")),
]


@pytest.mark.parametrize(("case", "optimizer"), PAIRS)
def test_a_skipped_step_changes_nothing(case: str, optimizer: str) -> None:
    def body(config: EngineConfig) -> tuple[list[str], list[str], int, list[str]]:
        engine = prepared(config, OPTIMIZERS[optimizer])
        cases.train(engine, num_steps=1)
        weights, state = cases.full_weights(engine), copied(engine.optimizer_state())
        micro_batches, num_valid = cases.share_of(engine, 1)
        engine.forward_backward(micro_batches, num_valid * 0)  # a division by zero: infinite gradients
        norm = engine.clip(1.0)
        engine.step(~torch.isfinite(norm))
        changed = same(weights, cases.full_weights(engine)), same(state, copied(engine.optimizer_state()))
        left = len(list(engine.gradients()))
        cases.train(engine, num_steps=1, first=2)
        return *changed, left, same(weights, cases.full_weights(engine))

    for weights, state, num_gradients, moved in run(case, body):
        assert weights == state == []
        assert num_gradients == 0
        assert any("q_proj" in name for name in moved)  # and the run goes on


def test_fused_optimizers_skip_without_reading_the_flag() -> None:
    class Unreadable(Tensor):
        """A flag that cannot be brought to the host."""

        def __bool__(self) -> bool:
            raise AssertionError("host sync")

    engine = prepared(SingleEngine(), fused)
    cases.train(engine, num_steps=1)
    micro_batches, num_valid = cases.share_of(engine, 1)
    engine.forward_backward(micro_batches, num_valid)
    engine.step(torch.tensor(True).as_subclass(Unreadable))


@pytest.mark.parametrize("case", ENGINES)
def test_clip(case: str) -> None:
    def body(config: EngineConfig) -> dict[str, Any]:
        engine = prepared(config)
        micro_batches, num_valid = cases.share_of(engine, 0)
        engine.forward_backward(micro_batches, num_valid)
        before = {name: g.clone() for name, g in engine.gradients()}
        measured = engine.clip(None)
        untouched = same(before, dict(engine.gradients()))
        loose = engine.clip(1e6)
        untouched += same(before, dict(engine.gradients()))
        clipped_from = engine.clip(0.25)
        after = torch.stack([g.norm() for _, g in engine.gradients()]).norm()
        expected = torch.stack([g.norm() for g in before.values()]).norm()
        return {
            "norms": [measured, loose, clipped_from],
            "untouched": untouched,
            "after": after,
            "expected": expected,
            "dtype": measured.dtype,
        }

    results = run(case, body)
    for result in results:
        assert result["untouched"] == []
        assert result["dtype"] == torch.float32
        for norm in result["norms"]:
            torch.testing.assert_close(norm, result["expected"], rtol=1e-5, atol=0.0)
            assert torch.equal(norm, results[0]["norms"][0])  # ranks agree to the bit
        torch.testing.assert_close(result["after"], torch.tensor(0.25), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("case", ENGINES)
def test_evaluate_leaves_training_as_it_was(case: str) -> None:
    def body(config: EngineConfig) -> dict[str, Any]:
        plain, engine = prepared(config), prepared(config)
        wanted = cases.train(plain)["weights"]
        sums = []
        for step in range(3):
            micro_batches, _ = cases.share_of(engine, step)
            losses = engine.evaluate(micro_batches[0])
            assert engine.module.training
            assert not losses["total"].requires_grad
            sums.append(losses["cross_entropy"])
            kinds = {type(value) for value in engine.model_state().values()}
            cases.train(engine, num_steps=1, first=step)
        return {
            "changed": same(wanted, cases.full_weights(engine)),
            "first": sums[0],
            "kinds": sorted(kind.__name__ for kind in kinds),
        }

    results = run(case, body)
    module = cases.make_module(torch.float32)
    cases.materialise(module)
    for rank, result in enumerate(results):
        size = cases.ROWS_PER_STEP // len(results)
        part = slice(rank * size, rank * size + size // 2)
        wanted = module({name: value[part] for name, value in cases.rows(0).items()})["cross_entropy"]
        torch.testing.assert_close(result["first"], wanted.detach(), rtol=1e-5, atol=0.0)
        assert result["changed"] == []
        assert result["kinds"] == (["DTensor"] if case == "fsdp" else ["Tensor"])


@pytest.mark.parametrize(("case", "optimizer"), PAIRS)
def test_state_read_into_a_fresh_engine_continues_bitwise(case: str, optimizer: str) -> None:
    def body(config: EngineConfig) -> tuple[list[str], list[str], list[str]]:
        first, second = prepared(config, OPTIMIZERS[optimizer]), prepared(config, OPTIMIZERS[optimizer])
        cases.train(first, num_steps=3)
        # Disturb the second, then read the state into it as a checkpoint reader would: in place.
        model_state, optimizer_state = second.model_state(), second.optimizer_state()
        for value in (*model_state.values(), *optimizer_state.values()):
            value.zero_()
        for state, source in ((model_state, first.model_state()), (optimizer_state, first.optimizer_state())):
            assert list(state) == list(source)
            for name, value in source.items():
                state[name].copy_(value)
        second.load_model_state(model_state)
        second.load_optimizer_state(optimizer_state)
        after_load = same(cases.full_weights(first), cases.full_weights(second))
        cases.train(first, num_steps=2, first=3)
        cases.train(second, num_steps=2, first=3)
        weights = same(cases.full_weights(first), cases.full_weights(second))
        return after_load, weights, same(copied(first.optimizer_state()), copied(second.optimizer_state()))

    assert run(case, body) == [([], [], [])] * ENGINES[case][1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_asking_for_state_early_changes_nothing(optimizer: str) -> None:
    def body(config: EngineConfig) -> tuple[list[str], bool, list[str]]:
        plain, asked = prepared(config, OPTIMIZERS[optimizer]), prepared(config, OPTIMIZERS[optimizer])
        before = cases.full_weights(asked)
        state = copied(asked.optimizer_state())
        unchanged = same(before, cases.full_weights(asked))
        fresh = all(v.count_nonzero() == 0 for n, v in state.items() if not n.endswith("/slow"))
        cases.train(plain)
        cases.train(asked)
        return unchanged, fresh, same(cases.full_weights(plain), cases.full_weights(asked))

    assert run("single", body) == [([], True, [])]
    assert run("fsdp", body) == [([], True, [])] * 2


def test_state_names_are_those_of_the_model() -> None:
    names = list(prepared(SingleEngine()).model_state())
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.1.mlp.down_proj.mask" in names
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names  # tied: one parameter, one name
    assert not any("inv_freq" in name for name in names)  # not persistent
    state = prepared(SingleEngine()).optimizer_state()
    assert {key.rpartition("/")[2] for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert "model.layers.1.input_layernorm.weight/exp_avg" not in state  # frozen
    assert "model.layers.0.input_layernorm.weight/exp_avg" in state
    assert run("fsdp", lambda config: list(prepared(config).model_state())) == [names] * 2


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_state_moves_between_engines_by_name(case: str) -> None:
    """Trained sharded, continued on one process, and the other way round."""

    def sharded(config: EngineConfig) -> Any:
        engine = prepared(config)
        cases.train(engine, num_steps=2)
        halfway = copied(engine.model_state()), copied(engine.optimizer_state())
        return halfway, cases.train(engine, num_steps=1, first=2)["weights"]

    (model_state, optimizer_state), wanted = run(case, sharded)[0]
    single = prepared(SingleEngine())
    single.load_model_state(model_state)
    single.load_optimizer_state(optimizer_state)
    found = cases.train(single, num_steps=1, first=2)["weights"]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)

    def continued(config: EngineConfig) -> dict[str, Tensor]:
        engine = prepared(config)
        engine.load_model_state(model_state)
        engine.load_optimizer_state(optimizer_state)
        return cases.train(engine, num_steps=1, first=2)["weights"]

    for result in run(case, continued):
        assert same(result, wanted) == []


def test_states_of_another_run_are_refused() -> None:
    engine = prepared(SingleEngine())
    with pytest.raises(RunError, match="other.weight"):
        engine.load_model_state({"other.weight": torch.zeros(1)})
    with pytest.raises(RunError, match="shape"):
        engine.load_model_state({"model.norm.weight": torch.zeros(5)})
    state = dict(engine.optimizer_state())
    state.pop("model.norm.weight/exp_avg")
    with pytest.raises(RunError, match="lacks optimizer state model.norm.weight/exp_avg"):
        engine.load_optimizer_state(state)


@pytest.mark.parametrize("case", ENGINES)
def test_full_parameter_and_its_tied_name(case: str) -> None:
    def body(config: EngineConfig) -> tuple[Tensor, Tensor, Tensor]:
        engine = prepared(config)
        names = ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.mask")
        return tuple(engine.full_parameter(name) for name in names)

    module = cases.make_module(torch.float32)
    cases.materialise(module)
    for embedding, head, mask in run(case, body):
        assert torch.equal(embedding, module.model.model.embed_tokens.weight)
        assert torch.equal(head, embedding)
        assert torch.equal(mask, module.model.model.layers[1].mlp.down_proj.mask)


def test_full_parameter_of_no_such_name() -> None:
    with pytest.raises(KeyError, match=r"no\.such"):
        prepared(SingleEngine()).full_parameter("no.such")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", ENGINES)
def test_frozen_models_compute_the_same_with_the_head_apart(case: str, precision: str) -> None:
    def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        # As distillation does: hidden states from the base model, the head's weight by itself.
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
        return nn.functional.linear(hidden, model.get_output_embeddings().weight)

    def body(config: EngineConfig) -> dict[str, Any]:
        engine, _ = build_engine(config, ranks=cases.ranks_here(), precision=precision, model_bytes=0)
        module = cases.make_module(torch.float32)
        cases.materialise(module)
        frozen = engine.prepare_frozen(module.model)
        with torch.no_grad():
            found = [logits(frozen, cases.rows(step)) for step in range(2)]
        kinds = {name: type(p).__name__ for name, p in frozen.named_parameters()}
        return {
            "logits": found,
            "trainable": any(p.requires_grad for p in frozen.parameters()),
            "training": frozen.training,
            "block": kinds["model.layers.0.mlp.up_proj.weight"],
            "root": kinds["model.embed_tokens.weight"],
        }

    module = cases.make_module(torch.float32)
    cases.materialise(module)
    with torch.no_grad():
        wanted = [logits(module.model, cases.rows(step)) for step in range(2)]
    tolerance = {"fp32": 1e-5, "bf16": 0.05}[precision]
    for result in run(case, body):
        for found, value in zip(result["logits"], wanted, strict=True):
            torch.testing.assert_close(found.float(), value, rtol=tolerance, atol=tolerance)
        assert not result["trainable"]
        assert not result["training"]
        assert result["block"] == ("DTensor" if case == "fsdp" else "Parameter")
        assert result["root"] == "Parameter"


def test_fsdp_keeps_shares_of_gradients_between_micro_batches() -> None:
    """With reshard_after_forward, no micro-batch leaves a full gradient behind."""

    def body(reshard: bool) -> tuple[int, int]:
        engine = prepared(FsdpEngine(reshard_after_forward=reshard))
        micro_batches, num_valid = cases.share_of(engine, 0)
        held: list[int] = []

        class Watched(list):
            def __iter__(self) -> Any:
                for batch in super().__iter__():
                    held.append(sum(local(p.grad).numel() for p in engine.module.parameters() if p.grad is not None))
                    yield batch

        engine.forward_backward(Watched(micro_batches), num_valid)
        return held[1], sum(p.numel() for p in engine.module.parameters() if p.requires_grad)

    for share, whole in run_ranks(lambda: body(True), 2):
        assert 0.4 * whole < share < 0.6 * whole
    # Else nothing has been reduced yet when the second begins.
    assert all(share == 0 for share, _ in run_ranks(lambda: body(False), 2))


def test_closing_releases_the_optimizer() -> None:
    engine = prepared(SingleEngine())
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        _ = engine.param_groups
