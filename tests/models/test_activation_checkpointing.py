"""Recomputing blocks changes memory, not maths: gradients per parameter, with and without stages."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from leanmill.core.errors import ConfigError
from leanmill.core.sites import Sites
from leanmill.core.stage import Slot, Stage
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.build import build_on_meta
from leanmill.models.compile import compile_blocks
from leanmill.models.config import ModelConfig
from leanmill.models.materialise import make_materialiser
from tests.distributed import run_ranks
from tests.models.families import FAMILIES, tiny_config


class Signed(Stage):
    """A straight-through quantiser: binary weights with a mean scale."""

    slot: ClassVar[Slot] = Slot.QUANT
    technique: ClassVar[str] = "signed"

    def forward(self, weight: Tensor) -> Tensor:
        quantised = weight.sign() * weight.abs().mean(dim=(-2, -1), keepdim=True)
        return weight + (quantised - weight).detach()


def model_of(family: str, staged: bool) -> nn.Module:
    config = ModelConfig(config=tiny_config(family), attention="sdpa")
    model = build_on_meta(config)
    if staged:
        for site in Sites(model).select():
            site.put(Signed())
    make_materialiser(config, seed=0)(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(7), torch.arange(10)]).expand(2, -1)
    logits = model(input_ids=ids, position_ids=positions).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


class CountOps(TorchDispatchMode):
    """Count what reaches the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_without(family: str, mode: str, staged: bool) -> None:
    plain = model_of(family, staged)
    recomputed = copy.deepcopy(plain)
    apply_activation_checkpointing(recomputed, mode)
    assert [n for n, _ in recomputed.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(recomputed.state_dict()) == list(plain.state_dict())
    expected, found = gradients(plain), gradients(recomputed)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


def saved_bytes(mode: str) -> tuple[int, dict[str, int]]:
    """Return what forward keeps for backward outside the parameters, and the operators backward runs."""
    model = model_of("llama", False)
    apply_activation_checkpointing(model, mode)
    parameters = {p.data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(60)[None]
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids).logits.sum()
    with CountOps() as ops:
        loss.backward()
    return sum(sizes.values()), ops.counts


def test_each_mode_recomputes_what_it_says() -> None:
    none, none_ops = saved_bytes("none")
    full, full_ops = saved_bytes("full")
    _, selective_ops = saved_bytes("selective")
    assert full < 0.4 * none
    attention = "_scaled_dot_product_flash_attention_for_cpu"
    assert attention not in none_ops
    assert attention not in selective_ops
    assert full_ops[attention] == 2
    assert selective_ops["mm"] == none_ops["mm"] < full_ops["mm"]
    assert selective_ops["silu"] == 2
    assert "silu" not in none_ops


def test_evaluation_does_not_recompute() -> None:
    model = model_of("llama", False)
    apply_activation_checkpointing(model, "full")
    model.eval()
    with CountOps() as ops, torch.no_grad():
        model(input_ids=torch.arange(9)[None])
    assert ops.counts["silu"] == 2


def test_a_frozen_base_stays_without_gradients() -> None:
    model = model_of("llama", False)
    apply_activation_checkpointing(model, "full")
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    model(input_ids=torch.arange(9)[None]).logits.sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.layers.1.mlp.up_proj.weight"]
    embedded = model.get_input_embeddings()(torch.arange(3)[None])
    assert not embedded.requires_grad


def test_a_family_without_support_is_refused() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing=none"):
        apply_activation_checkpointing(nn.Linear(2, 2), "full")
    apply_activation_checkpointing(nn.Linear(2, 2), "none")


def sharded_gradients(mode: str) -> dict[str, Tensor]:
    model = model_of("mixtral", True)
    apply_activation_checkpointing(model, mode)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return {name: gradient.full_tensor() for name, gradient in gradients(model).items()}


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradients_of_a_sharded_model(mode: str) -> None:
    expected = gradients(model_of("mixtral", True))
    found = run_ranks(sharded_gradients, 2, mode)[0]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_compiled_blocks_keep_names_and_gradients(mode: str) -> None:
    plain = model_of("llama", True)
    compiled = copy.deepcopy(plain)
    apply_activation_checkpointing(compiled, mode)
    compile_blocks(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    expected, found = gradients(plain), gradients(compiled)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_compiled_blocks_below_all_that_trains(mode: str) -> None:
    """The compiler cannot trace the recomputation of a block that has no backward."""
    found = []
    for is_compiled in (False, True):
        model = model_of("llama", staged=False).train().requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
        if is_compiled:
            apply_activation_checkpointing(model, mode)  # type: ignore[arg-type]
            torch._dynamo.reset()
            for block in model.model.layers:
                block.compile(backend="aot_eager")
        ids = torch.randint(0, 97, (2, 17), generator=torch.Generator().manual_seed(1))
        model(input_ids=ids).logits.float().square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("prefix", ["activation", "gradient"])
def test_the_switch_goes_by_the_name_that_transformers_has(prefix):
    class Model(nn.Module):
        supports_gradient_checkpointing = True

        def disable_input_require_grads(self):
            pass

    given = {}
    setattr(Model, f"{prefix}_checkpointing_enable", lambda self, **options: given.update(options))
    apply_activation_checkpointing(Model(), "full")
    assert given == {f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
