from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from leanmill.core.around import Around, Ring, put_around, take_off
from leanmill.core.sites import Sites
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from tests.core.tiny import loss_of, tiny, tokens
from tests.distributed import run_ranks


class Mask(Around):
    """Lets a block through, or not, as a buffer says; counts its calls."""

    technique, ring = "mask", Ring.SKIP

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keep", torch.ones(1), persistent=False)
        self.num_calls = 0

    def forward(self, call, /, hidden, *args, **kwargs):
        if not torch.compiler.is_compiling():
            self.num_calls += 1
        return torch.where(self.keep > 0, call(hidden, *args, **kwargs), hidden)


class Gain(Around):
    """A trained factor on what comes out."""

    technique, ring = "gain", Ring.SCALE

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, call, /, *args, **kwargs):
        return call(*args, **kwargs) * self.gain


def _model(family="llama"):
    model = tiny(family)
    for place in Sites(model).modules("block"):
        place.around(Gain())
        place.around(Mask())
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_on_and_off_again_is_bitwise_the_plain_model(family):
    plain, model, ids = tiny(family), _model(family), tokens()
    expected, keys = loss_of(plain, ids), set(plain.state_dict())
    assert torch.equal(loss_of(model, ids), expected)
    assert set(model.state_dict()) - keys == {f"model.layers.{layer}.around.gain.gain" for layer in (0, 1)}
    assert keys <= set(model.state_dict())
    model.load_state_dict(plain.state_dict(), strict=False)
    for block in model.model.layers:
        take_off(block)
    assert set(model.state_dict()) == keys
    assert torch.equal(loss_of(model, ids), expected)
    assert "forward" not in vars(model.model.layers[0])


def test_rings_stand_in_their_order_whatever_the_order_of_putting():
    calls = []

    def named(name, in_ring):
        class Logged(Around):
            technique, ring = name, in_ring

            def forward(self, call, /, x):
                calls.append(name)
                return call(x)

        return Logged()

    module = nn.Linear(2, 2)
    for name, ring in (("d", Ring.SCALE), ("b", Ring.BRANCH), ("a", Ring.SKIP), ("c", Ring.BRANCH), ("d", Ring.SCALE)):
        put_around(module, named(name, ring))
    module(torch.zeros(1, 2))
    assert calls == ["a", "b", "c", "d", "d"]
    assert list(module.around) == ["a", "b", "c", "d", "d_2"]


def test_gradients_are_those_of_the_formula():
    module, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    put_around(module, Gain())
    module.around["gain"].gain.data.fill_(0.5)
    module(x).square().sum().backward()
    again, weight = x.detach().requires_grad_(), module.weight.detach().requires_grad_()
    gain = torch.tensor([0.5], requires_grad=True)
    ((again @ weight.T + module.bias.detach()) * gain).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)
    torch.testing.assert_close(module.around["gain"].gain.grad, gain.grad)


def test_a_copy_calls_its_own_parts():
    model, ids = _model(), tokens()
    expected = loss_of(model, ids)
    twin = copy.deepcopy(model)
    twin.model.layers[0].around["mask"].keep.zero_()
    assert not torch.equal(loss_of(twin, ids), expected)
    assert torch.equal(loss_of(model, ids), expected)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_stands_outside_of_activation_checkpointing(mode):
    expected, model, ids = _model().train(), _model().train(), tokens()
    apply_activation_checkpointing(model, mode)
    for other in (expected, model):
        loss = loss_of(other, ids)
        for block in other.model.layers:
            block.around["mask"].keep.zero_()  # what was decided in forward must hold in backward
        loss.backward()
    for (name, got), (_, parameter) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, parameter.grad, msg=name)
    assert [block.around["mask"].num_calls for block in model.model.layers] == [1, 1]


def test_what_stands_inside_of_blocks_compiles_once_for_all_layers():
    from torch._dynamo.utils import counters

    model = tiny()
    for place in [*Sites(model).modules("norm"), *Sites(model).modules("mlp")]:
        if place.layer is not None:
            place.around(Gain())
    torch._dynamo.reset()
    counters.clear()
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    loss_of(model, tokens()).backward()
    assert counters["stats"]["unique_graphs"] == 1


def test_a_block_compiles_whole_and_once_for_all_layers():
    from torch._dynamo.utils import counters

    expected, model, ids = _model().train(), _model().train(), tokens()
    loss_of(expected, ids).backward()
    torch._dynamo.reset()
    counters.clear()
    for block in model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        loss_of(model, ids).backward()
    assert counters["stats"]["unique_graphs"] == 1
    for (name, got), (_, parameter) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, parameter.grad, msg=name, rtol=1e-4, atol=1e-6)
    model.model.layers[1].around["mask"].keep.zero_()
    loss_of(model, ids)
    assert counters["stats"]["unique_graphs"] == 1


def test_parameters_are_sharded_with_their_block_and_ranks_may_mask_differently():
    def train():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        model, mesh = _model().train(), init_device_mesh("cpu", (2,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.model.layers[0].around["mask"].keep.fill_(float(dist.get_rank() == 0))
        loss_of(model, tokens(seed=5)).backward()
        gain = model.model.layers[0].around["gain"].gain
        group = model.model.layers[0]._get_fsdp_state()._fsdp_param_groups[0]
        is_member = any(p.sharded_param is gain for p in group.fsdp_params)
        return is_member, gain.grad.full_tensor(), model.model.layers[1].mlp.up_proj.weight.grad.full_tensor()

    (is_member, gain, weight), _ = run_ranks(train, 2)
    expected = []
    for keep in (1.0, 0.0):
        model = _model().train()
        model.model.layers[0].around["mask"].keep.fill_(keep)
        loss_of(model, tokens(seed=5)).backward()
        expected.append((model.model.layers[0].around["gain"].gain.grad, model.model.layers[1].mlp.up_proj.weight.grad))
    assert is_member
    torch.testing.assert_close(gain, (expected[0][0] + expected[1][0]) / 2)
    torch.testing.assert_close(weight, (expected[0][1] + expected[1][1]) / 2)
