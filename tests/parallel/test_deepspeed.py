"""ZeRO stages against one plain process: gradients, weights, clipping, skipping, state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.site import EmbeddingSite, LinearSite
from leanmill.core.stage import Slot, Stage
from leanmill.parallel import config as configs
from leanmill.parallel.deepspeed import DeepSpeedEngine
from leanmill.parallel.deepspeed_config import check_config, check_optimizer
from leanmill.parallel.deepspeed_state import ZeroState
from leanmill.parallel.engine import Preparation
from leanmill.parallel.tensors import assign, full
from tests.distributed import run_ranks


deepspeed = pytest.importorskip("deepspeed")
# What DeepSpeed imports late costs seconds: once here instead of once in every rank of every test.
pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
deepspeed.ops.__compatible_ops__  # noqa: B018

WORLD, MICRO, ROWS, LENGTH, VOCAB, HIDDEN, INNER = 2, 2, 3, 7, 61, 24, 35
MAX_NORM = 0.05
"""Far below the norms of the first steps, so that clipping always acts."""

Values = dict[str, Tensor]


class ScaledMask(Stage):
    """A stage with everything sharding can trip over: a trained (out, 1) scale and a frozen bool mask."""

    slot: ClassVar[Slot] = Slot.MASK
    technique: ClassVar[str] = "scaled_mask"

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(out_features, 1, device="meta"))
        self.mask = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.bool, device="meta"), False)

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * self.mask * self.scale).to(weight.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = LinearSite.adopt(nn.Linear(HIDDEN, INNER), "up")
        self.down = LinearSite.adopt(nn.Linear(INNER, HIDDEN, bias=False), "down")

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.down(F.silu(self.up(self.norm(hidden))))


class Model(nn.Module):
    """Tied embeddings, a buffer, biases, and shapes that no rank count divides."""

    def __init__(self, staged: bool) -> None:
        super().__init__()
        self.embed = EmbeddingSite.adopt(nn.Embedding(VOCAB, HIDDEN), "embed")
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.zeros(HIDDEN))
        for block in self.blocks if staged else []:
            block.up.put(ScaledMask(INNER, HIDDEN))
            block.down.put(ScaledMask(HIDDEN, INNER))

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids) + self.offset
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class Train(nn.Module):
    """A train module as the engines know it."""

    def __init__(self, staged: bool = True, freeze_base: bool = False) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = Model(staged)
        for name, parameter in self.model.named_parameters():
            if freeze_base and "stages" not in name:
                parameter.requires_grad_(False)

    def forward(self, batch: Mapping[str, Tensor]) -> Values:
        logits = self.model(batch["input_ids"]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        return {"total": loss, "cross_entropy": loss}


def materialise(module: nn.Module) -> None:
    """Fill plain tensors and DTensors with values that depend on their names only."""
    for name, owner, key, tensor in _tensors(module):
        generator = torch.Generator().manual_seed(sum(name.encode()))
        value = torch.randn(tensor.shape, generator=generator) * 0.2
        if tensor.dtype == torch.bool:
            value = value > -0.1
        elif "scale" in name or "norm.weight" in name:
            value = value + 1.0
        if tensor.is_meta:
            tensor = torch.empty_like(tensor, device="cpu")
            owner._buffers[key] = tensor
        assign(tensor, value.to(tensor.dtype))


@torch.no_grad()
def _tensors(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for key, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{path}.{key}", owner, key, tensor.data if tensor.requires_grad else tensor


def micro_batch(step: int, rank: int, index: int) -> Values:
    """Rows whose number of targets differs from rank to rank and from micro-batch to micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + index)
    ids = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[:, : (3 * rank + 2 * index + step) % LENGTH] = -100
    return {"input_ids": ids[:, :-1], "labels": labels}


def num_valid(step: int) -> Tensor:
    batches = [micro_batch(step, rank, index) for rank in range(WORLD) for index in range(MICRO)]
    return torch.tensor(float(sum((b["labels"] != -100).sum() for b in batches)))


def adamw(module: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=1e-2, betas=(0.9, 0.95))


def reference(steps: int, max_norm: float | None, build: Callable[[], nn.Module] = Train) -> list[dict[str, Any]]:
    """Plain PyTorch on one process over the batches of all ranks."""
    module = build()
    fill_plain(module)
    optimizer = adamw(module)
    records = []
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(WORLD):
            for index in range(MICRO):
                (module(micro_batch(step, rank, index))["total"] / num_valid(step)).backward()
        trained = {n: p for n, p in module.model.named_parameters() if p.requires_grad}  # type: ignore[union-attr]
        gradients = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), math.inf if max_norm is None else max_norm)
        optimizer.step()
        weights = {n: p.detach().clone() for n, p in trained.items()}
        records.append({"gradients": gradients, "norm": norm, "weights": weights})
    return records


def fill_plain(module: nn.Module) -> None:
    shared: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and parameter.is_meta:
                new = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
                owner._parameters[key] = shared.setdefault(id(parameter), new)
    materialise(module)


def make_engine(
    stage: int,
    *,
    max_norm: float | None = MAX_NORM,
    precision: Any = "fp32",
    build: Callable[[], nn.Module] = Train,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    offload: str | None = None,
    path: str | None = None,
    fill: Callable[[nn.Module], None] = materialise,
) -> Any:
    place = None if offload is None else configs.DeepSpeedOffload(device=offload, path=path)  # type: ignore[arg-type]
    config = configs.DeepSpeedEngine(
        stage=stage,  # type: ignore[arg-type]
        offload_optimizer=place if stage > 0 else None,
        offload_parameters=place if stage == 3 else None,
    )
    # Nothing may stay gathered, or tiny models would not exercise ZeRO-3.
    engine = DeepSpeedEngine(config, device=torch.device("cpu"), precision=precision, persist_below=0)
    engine.prepare(
        build(),
        Preparation(materialise=fill, make_optimizer=optimizer, num_micro_batches=MICRO, max_grad_norm=max_norm),
    )
    return engine


def backward(engine: Any, step: int) -> Values:
    batches = [micro_batch(step, engine.data_rank, index) for index in range(MICRO)]
    return engine.forward_backward(batches, num_valid(step))  # type: ignore[no-any-return]


def train_step(engine: Any, step: int, max_norm: float | None = MAX_NORM) -> Tensor:
    backward(engine, step)
    norm = engine.clip(max_norm)
    engine.step(~torch.isfinite(norm))
    return norm  # type: ignore[no-any-return]


def trained_weights(engine: Any) -> Values:
    names = [n for n, p in engine.module.model.named_parameters() if p.requires_grad]
    return {name: engine.full_parameter(name) for name in names}


def snapshot(engine: Any) -> tuple[Values, Values]:
    """A copy of all state, as whole tensors."""
    model = {k: full(v).clone() for k, v in engine.model_state().items()}
    return model, {k: full(v).clone() for k, v in engine.optimizer_state().items()}


def assert_equal(left: Values, right: Values) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def assert_close(left: Values, right: Values, **tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def recorded(engine: Any, steps: int, max_norm: float | None) -> list[dict[str, Any]]:
    records = []
    for step in range(steps):
        backward(engine, step)
        gradients = {name: value.clone() for name, value in engine.gradients()}
        norm = engine.clip(max_norm)
        engine.step(~torch.isfinite(norm))
        records.append({"gradients": gradients, "norm": norm, "weights": trained_weights(engine)})
    return records


def assert_as_reference(
    got: Sequence[dict[str, Any]], want: Sequence[dict[str, Any]], rtol: float = 1e-4, atol: float = 2e-6
) -> None:
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine["norm"], theirs["norm"], rtol=rtol, atol=atol)
        assert_close(mine["gradients"], theirs["gradients"], rtol=rtol, atol=atol)
        assert_close(mine["weights"], theirs["weights"], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("max_norm", [None, MAX_NORM])
def test_equals_one_process(stage: int, max_norm: float | None) -> None:
    """Unequal target counts per rank and micro-batch, accumulation, clipping: as one plain process."""

    def ranks() -> list[dict[str, Any]]:
        return recorded(make_engine(stage, max_norm=max_norm), 3, max_norm)

    for result in run_ranks(ranks, WORLD):
        assert_as_reference(result, reference(3, max_norm))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_skip_changes_nothing(stage: int) -> None:
    """A skipped step drops the gradients and leaves weights, state and counters bitwise alone."""

    def ranks() -> None:
        engine, other = make_engine(stage), make_engine(stage)
        for step in range(2):
            train_step(engine, step)
            train_step(other, step)
        for poison in (False, True):
            before = snapshot(engine)
            batches = [micro_batch(9, engine.data_rank, index) for index in range(MICRO)]
            # A zero divisor makes every gradient infinite or NaN on every rank.
            engine.forward_backward(batches, torch.tensor(0.0) if poison else num_valid(9))
            norm = engine.clip(MAX_NORM)
            assert bool(torch.isfinite(norm)) is not poison
            engine.step(torch.tensor(True))
            for mine, theirs in zip(snapshot(engine), before, strict=True):
                assert_equal(mine, theirs)
        # Had anything been left behind, the next step would differ.
        assert torch.equal(train_step(engine, 2), train_step(other, 2))
        assert_equal(trained_weights(engine), trained_weights(other))

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_with_nan_is_seen_by_all(stage: int) -> None:
    def ranks() -> tuple[Tensor, Values, Values]:
        engine = make_engine(stage)
        before = trained_weights(engine)
        batches = [micro_batch(0, engine.data_rank, index) for index in range(MICRO)]
        engine.forward_backward(batches, num_valid(0) * (math.nan if engine.data_rank == 1 else 1.0))
        norm = engine.clip(MAX_NORM)
        engine.step(~torch.isfinite(norm))
        return norm, before, trained_weights(engine)

    for norm, before, after in run_ranks(ranks, WORLD):
        assert not torch.isfinite(norm)
        assert_equal(before, after)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_bitwise(stage: int) -> None:
    """State read after step 2 into a new engine gives steps 3 and 4 bitwise, from either kind of reader."""

    def ranks() -> None:
        whole = make_engine(stage)
        for step in range(2):
            train_step(whole, step)
        model, optimizer = whole.model_state(), whole.optimizer_state()
        saved = {k: v.clone() for k, v in model.items()}, {k: v.clone() for k, v in optimizer.items()}
        for step in (2, 3):
            train_step(whole, step)

        resumed = make_engine(stage)
        # As distributed checkpointing does it: read in place into what the engine hands out.
        for mine, kept in zip((resumed.model_state(), resumed.optimizer_state()), saved, strict=True):
            assert mine.keys() == kept.keys()
            for name, tensor in mine.items():
                assign(tensor, kept[name])
            (resumed.load_model_state if mine.keys() == saved[0].keys() else resumed.load_optimizer_state)(mine)
        for step in (2, 3):
            train_step(resumed, step)
        for left, right in zip(snapshot(whole), snapshot(resumed), strict=True):
            assert_equal(left, right)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 2), (2, 0)])
def test_state_moves_between_stages(first: int, second: int) -> None:
    def ranks() -> None:
        one, two = make_engine(first), make_engine(second)
        train_step(one, 0)
        model, optimizer = snapshot(one)
        two.load_model_state(model)
        two.load_optimizer_state(optimizer)
        for mine, theirs in zip(snapshot(two), (model, optimizer), strict=True):
            assert_equal(mine, theirs)
        train_step(one, 1)
        train_step(two, 1)
        assert_close(trained_weights(two), trained_weights(one), rtol=1e-5, atol=1e-6)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [1, 3])
def test_state_before_the_first_step_is_zero_and_harmless(stage: int) -> None:
    def ranks() -> None:
        asked, plain = make_engine(stage), make_engine(stage)
        before = trained_weights(asked)
        state = snapshot(asked)[1]
        assert all(not value.any() for value in state.values())
        assert any(name.endswith("/step") for name in state)
        assert_equal(trained_weights(asked), before)
        train_step(asked, 0)
        train_step(plain, 0)
        for left, right in zip(snapshot(asked), snapshot(plain), strict=True):
            assert_equal(left, right)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_state_is_shared_out_and_masks_stay_bool(stage: int) -> None:
    def ranks() -> None:
        from torch.distributed.tensor import DTensor

        engine = make_engine(stage)
        train_step(engine, 0)
        state = engine.model_state() | engine.optimizer_state()
        name = "blocks.0.up.stages.mask.mask"
        assert state[name].dtype == torch.bool
        assert "head.weight" not in state
        assert "offset" in state
        trained = list(trained_weights(engine))
        for key in [*trained, *(f"{k}/exp_avg" for k in trained)]:
            assert isinstance(state[key], DTensor)
            assert state[key].dtype == torch.float32
            rows = state[key].shape[0]
            mine = -(-rows // WORLD) if engine.data_rank == 0 else rows // WORLD
            assert state[key].to_local().shape[0] == mine
        if stage == 3:  # sharded with the weight, not a whole copy a rank
            mask = engine.module.model.blocks[0].up.stages["mask"].mask
            assert mask.ds_tensor.numel() == INNER * HIDDEN // WORLD
            assert mask.ds_tensor.dtype == torch.bool

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_base(stage: int) -> None:
    """Only the stages' parameters train; the base is bitwise what it was, and is in the state."""

    def build() -> nn.Module:
        return Train(freeze_base=True)

    def ranks() -> list[dict[str, Any]]:
        engine = make_engine(stage, build=build)
        before = engine.full_parameter("blocks.1.up.weight")
        records = recorded(engine, 2, MAX_NORM)
        assert torch.equal(engine.full_parameter("blocks.1.up.weight"), before)
        assert "blocks.1.up.weight" in engine.model_state()
        assert {k.partition("/")[0] for k in engine.optimizer_state()} == set(trained_weights(engine))
        return records

    for result in run_ranks(ranks, WORLD):
        assert_as_reference(result, reference(2, MAX_NORM, build))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_cpu_offload(stage: int) -> None:
    """Optimizer state, and parameters in stage 3, on the CPU, stepped by the recipe's own optimizer."""

    def ranks() -> list[dict[str, Any]]:
        engine = make_engine(stage, offload="cpu")
        records = recorded(engine, 2, MAX_NORM)
        before = snapshot(engine)
        engine.forward_backward([micro_batch(9, engine.data_rank, i) for i in range(MICRO)], torch.tensor(0.0))
        assert not torch.isfinite(engine.clip(MAX_NORM))
        engine.step(torch.tensor(True))
        for mine, theirs in zip(snapshot(engine), before, strict=True):
            assert_equal(mine, theirs)
        return [*records, *recorded_from(engine, 2, MAX_NORM)]

    for result in run_ranks(ranks, WORLD):
        assert_as_reference(result, reference(3, MAX_NORM))


def recorded_from(engine: Any, step: int, max_norm: float) -> list[dict[str, Any]]:
    backward(engine, step)
    gradients = {name: value.clone() for name, value in engine.gradients()}
    norm = engine.clip(max_norm)
    engine.step(~torch.isfinite(norm))
    return [{"gradients": gradients, "norm": norm, "weights": trained_weights(engine)}]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_computes_in_bf16_and_keeps_fp32(stage: int) -> None:
    def ranks() -> list[dict[str, Any]]:
        engine = make_engine(stage, precision="bf16")
        seen: list[torch.dtype] = []
        engine.module.model.head.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        records = recorded(engine, 2, MAX_NORM)
        assert set(seen) == {torch.bfloat16}
        # Reduced and kept in fp32: more than bf16's 8 bits survive.
        assert all(not torch.equal(g, g.bfloat16().float()) for g in records[0]["gradients"].values())
        state = engine.model_state()
        assert {v.dtype for v in state.values()} == {torch.float32, torch.bool}
        return records

    want = reference(2, MAX_NORM)
    for result in run_ranks(ranks, WORLD):
        for mine, theirs in zip(result, want, strict=True):
            torch.testing.assert_close(mine["norm"], theirs["norm"], rtol=0.05, atol=0.0)
        for name, gradient in result[0]["gradients"].items():
            error = (gradient - want[0]["gradients"][name]).norm() / want[0]["gradients"][name].norm()
            assert error < 0.03, name


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("kind", ["lion", "lookahead"])
def test_other_optimizers(stage: int, kind: str) -> None:
    """Optimizers of the recipe step flat partitions as they step parameters, and resume."""
    from leanmill.trainer.optim.lion import Lion
    from leanmill.trainer.optim.lookahead import Lookahead

    def make(module: nn.Module) -> torch.optim.Optimizer:
        if kind == "lion":
            return Lion(adamw(module).param_groups, lr=1e-3)
        return Lookahead(adamw(module), every=2, alpha=0.5)

    def ranks() -> None:
        engine, plain = make_engine(stage, optimizer=make), make_engine(0, optimizer=make)
        for step in range(3):
            train_step(engine, step)
            train_step(plain, step)
        assert_close(trained_weights(engine), trained_weights(plain), rtol=1e-4, atol=2e-5)
        fresh = make_engine(stage, optimizer=make)
        model, optimizer = snapshot(engine)
        fresh.load_model_state(model)
        fresh.load_optimizer_state(optimizer)
        train_step(fresh, 3)
        train_step(engine, 3)
        for left, right in zip(snapshot(fresh), snapshot(engine), strict=True):
            assert_equal(left, right)

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [2, 3])
def test_evaluate_between_steps(stage: int) -> None:
    def ranks() -> None:
        engine, other = make_engine(stage), make_engine(stage)
        for step in range(2):
            train_step(engine, step)
            train_step(other, step)
            losses = engine.evaluate(micro_batch(50, 0, 0))
            assert engine.module.training
            assert not losses["total"].requires_grad
        assert torch.equal(losses["total"], other.evaluate(micro_batch(50, 0, 0))["total"])
        assert_equal(trained_weights(engine), trained_weights(other))

    run_ranks(ranks, WORLD)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_one_process_and_learning_rate(stage: int) -> None:
    """One rank works, `param_groups` is what the step reads, and engines can follow each other."""

    def ranks() -> None:
        for _ in range(2):
            engine = make_engine(stage)
            before = trained_weights(engine)
            for group in engine.param_groups:
                group["lr"] = 0.0
            train_step(engine, 0)
            assert_equal(trained_weights(engine), before)
            for group in engine.param_groups:
                group["lr"] = 1e-2
            train_step(engine, 0)
            after = trained_weights(engine)
            assert all(not torch.equal(after[name], before[name]) for name in before)
            engine.close()

    run_ranks(ranks, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": 2, "offload_optimizer": {"device": "nvme", "path": "/"}}, "device: cpu"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme", "path": "/no/such"}}, "create it first"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_config(configs.DeepSpeedEngine.model_validate(arguments))


def test_nvme_without_libaio_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    place = {"device": "nvme", "path": str(tmp_path)}
    with pytest.raises(ConfigError, match="apt-get install libaio-dev"):
        check_config(configs.DeepSpeedEngine.model_validate({"stage": 3, "offload_optimizer": place}))


def test_low_bit_optimizer_is_refused() -> None:
    optim = pytest.importorskip("torchao.optim")
    with pytest.raises(ConfigError, match="low-bit"):
        check_optimizer(optim.AdamW8bit([nn.Parameter(torch.zeros(4, 4))]))


@pytest.mark.parametrize(("first", "second"), [(3, 3), (2, 1)])
def test_checkpoint_loads_at_another_rank_count(first: int, second: int, tmp_path: Path) -> None:
    """Written by 2 ranks, read by 3 and by 1, whatever the stage."""
    from leanmill.trainer.checkpoint.manager import CheckpointManager
    from leanmill.trainer.config import CheckpointConfig

    def save() -> tuple[Values, Values]:
        engine = make_engine(first)
        train_step(engine, 0)
        manager = CheckpointManager(tmp_path, CheckpointConfig())
        manager.save(1, engine, {"tokens": 5}, {})
        # What is written is the state of that moment, though training goes on.
        state = snapshot(engine)
        train_step(engine, 1)
        manager.wait()
        return state

    def load() -> tuple[Values, Values]:
        engine = make_engine(second)
        manager = CheckpointManager(tmp_path, CheckpointConfig())
        path = manager.find("auto")
        assert path is not None
        assert manager.load(path, engine)["tokens"] == 5
        return snapshot(engine)

    saved = run_ranks(save, WORLD)[0]
    for world_size in (3, 1):
        for loaded in run_ranks(load, world_size):
            for left, right in zip(saved, loaded, strict=True):
                assert_equal(left, right)


def test_swapped_out_state_is_not_made_from_nothing() -> None:
    weight = nn.Parameter(torch.empty(0))
    wrapper = SimpleNamespace(
        optimizer=torch.optim.AdamW([weight]), swap_optimizer=True, fp32_partitioned_groups_flat=[weight]
    )
    with pytest.raises(RunError, match="device=cpu"):
        ZeroState(wrapper, stage=3).allocate()


class WideTrain(nn.Module):
    """A train module whose weights pass the 1 MiB a rank below which DeepSpeed keeps a tensor in memory."""

    def __init__(self, inner: int = 40_000) -> None:
        super().__init__()
        with torch.device("meta"):
            self.model = nn.Sequential(
                nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, inner), nn.Tanh(), nn.Linear(inner, VOCAB)
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Values:
        logits = self.model(batch["input_ids"])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        return {"total": loss, "cross_entropy": loss}


@pytest.mark.slow
def test_nvme_offload(tmp_path: Path) -> None:
    """Optimizer state and parameters in files, where libaio is installed: the steps of plain ZeRO-3."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("needs libaio")

    def ranks() -> None:
        engine = make_engine(3, offload="nvme", path=str(tmp_path), build=WideTrain)
        plain = make_engine(3, build=WideTrain)
        for step in range(3):
            torch.testing.assert_close(train_step(engine, step), train_step(plain, step))
        assert_close(trained_weights(engine), trained_weights(plain), rtol=1e-4, atol=1e-5)
        # All kinds of state: parameters, masters with their moments.
        for folder in ("float32params", "optimizer"):
            assert any((tmp_path / "zero_stage_3" / folder).rglob("*.swp")), folder
        for mine, theirs in zip(snapshot(engine), snapshot(plain), strict=True):
            assert_close(mine, theirs, rtol=1e-4, atol=1e-5)

    run_ranks(ranks, WORLD, timeout_seconds=900.0)
