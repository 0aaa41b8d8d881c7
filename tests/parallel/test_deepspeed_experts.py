"""ZeRO-3 with stacked experts that carry stages, routed differently on each rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from leanmill.core.sites import Sites
from leanmill.core.stage import Slot, Stage
from leanmill.parallel import config as configs
from leanmill.parallel.deepspeed import DeepSpeedEngine
from leanmill.parallel.engine import Preparation
from leanmill.parallel.tensors import assign
from tests.distributed import run_ranks


pytest.importorskip("deepspeed.runtime.zero.muon.muon_optimizer")
from deepspeed.utils import z3_leaf_module  # noqa: E402


transformers = pytest.importorskip("transformers")

WORLD, MICRO, VOCAB = 2, 2, 64


class RowScale(Stage):
    """A trained scale for each output row of a weight [..., out, in]."""

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "row_scale"

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(*shape[:-1], 1, device="meta"))

    def forward(self, weight: Tensor) -> Tensor:
        return (weight * self.scale).to(weight.dtype)


class Train(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = transformers.Qwen3MoeConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=6,
            num_experts_per_tok=2,
            decoder_sparse_step=1,
            tie_word_embeddings=True,
        )
        with torch.device("meta"):
            self.model = transformers.AutoModelForCausalLM.from_config(config)
        for site in Sites(self.model).select():
            site.put(RowScale(site.raw_weight.shape))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        logits = self.model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        return {"total": loss}


def materialise(module: nn.Module) -> None:
    """Fill everything by name; rotary buffers are recomputed as their module defines them."""
    done: set[int] = set()
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is None or id(parameter) in done:
                continue
            if parameter.is_meta:
                meta, parameter = parameter, nn.Parameter(torch.empty_like(parameter, device="cpu"))
                for other in module.modules():  # tied ones stay one object
                    other._parameters.update({n: parameter for n, p in other._parameters.items() if p is meta})
            done.add(id(parameter))
            generator = torch.Generator().manual_seed(sum(f"{path}.{key}".encode()))
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            assign(parameter.data, value + 1.0 if "norm" in path or key == "scale" else value)
        for key, buffer in owner._buffers.items():
            if buffer is not None and buffer.is_meta:
                owner._buffers[key] = 10000.0 ** (-torch.arange(0, 8, 2).float() / 8)


def micro_batch(rank: int, index: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * rank + index)
    # One rank repeats a single token, so all its copies go to the same two experts.
    ids = torch.randint(VOCAB, (2, 9), generator=generator) if rank == 0 else torch.full((2, 9), 7 + index)
    labels = ids.roll(-1, dims=1)
    labels[:, -1 - index - 3 * rank :] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(9).expand(2, 9)}


NUM_VALID = torch.tensor(
    float(sum((micro_batch(r, i)["labels"] != -100).sum() for r in range(WORLD) for i in range(MICRO)))
)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)


def reference(steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    module = Train()
    materialise(module)
    optimizer = sgd(module)
    for _ in range(steps):
        optimizer.zero_grad()
        for rank in range(WORLD):
            for index in range(MICRO):
                (module(micro_batch(rank, index))["total"] / NUM_VALID).backward()
        gradients = {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}
        optimizer.step()
    return gradients, {n: p.detach().clone() for n, p in module.model.named_parameters()}


@pytest.mark.parametrize("stage", [2, 3])
def test_experts_equal_one_process(stage: int) -> None:
    """Gradients of experts, routers and stages, and weights after two steps; 6 experts on 2 ranks."""

    def ranks() -> Any:
        config = configs.DeepSpeedEngine(stage=stage)  # type: ignore[arg-type]
        engine = DeepSpeedEngine(config, device=torch.device("cpu"), persist_below=0)
        engine.prepare(
            Train(),
            Preparation(materialise=materialise, make_optimizer=sgd, num_micro_batches=MICRO, max_grad_norm=None),
        )
        losses = []
        for _ in range(2):
            batches = [micro_batch(engine.data_rank, index) for index in range(MICRO)]
            losses.append(engine.forward_backward(batches, NUM_VALID)["total"])
            gradients = {name: value.clone() for name, value in engine.gradients()}
            engine.step(~torch.isfinite(engine.clip(None)))
        assert losses[1] < losses[0]
        if stage == 3:
            leaves = [name for name, m in engine.module.named_modules() if z3_leaf_module(m)]
            assert [name.rpartition(".")[2] for name in leaves] == ["experts", "experts"]
        names = [name for name, _ in engine.module.model.named_parameters()]
        return gradients, {name: engine.full_parameter(name) for name in names}

    results = run_ranks(ranks, WORLD)
    gradients, weights = reference(2)
    assert any("experts.sites.gate_up_proj.stages" in name for name in gradients)
    for got_gradients, got_weights in results:
        for got, want in ((got_gradients, gradients), (got_weights, weights)):
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(
                    got[name], want[name], rtol=1e-3, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}"
                )
