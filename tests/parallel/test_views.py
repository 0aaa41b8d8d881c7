"""Rule views: the pieces of all ranks make the whole, what is written to them counts, nothing is gathered."""

from __future__ import annotations

import pytest
import torch

from leanmill.core.views import Box, Span
from leanmill.parallel import config as configs
from leanmill.parallel.ddp import DdpEngine
from leanmill.parallel.fsdp import FsdpEngine
from leanmill.parallel.single import SingleEngine
from leanmill.parallel.tensors import local
from tests.distributed import run_ranks
from tests.parallel import cases
from tests.parallel.view_cases import check_gradients, check_values_and_state, mask_gradients


def _engine(kind):
    classes = {
        "single": (SingleEngine, configs.SingleEngine()),
        "ddp": (DdpEngine, configs.DdpEngine()),
        "fsdp": (FsdpEngine, configs.FsdpEngine()),
        "kept whole": (FsdpEngine, configs.FsdpEngine(reshard_after_forward=False)),
        "hybrid": (FsdpEngine, configs.FsdpEngine(shard_size=2)),
    }
    engine_class, config = classes[kind]
    engine = engine_class(config, ranks=cases.ranks_here(), precision="fp32")
    engine.prepare(cases.make_module(torch.float32), cases.preparation())
    return engine


def _backward(engine, step=0):
    engine.forward_backward(*cases.share_of(engine, step))


def _check(kind):
    engine = _engine(kind)
    model = engine.module.model
    assert all(view.states() == {} and view.grad is None for view in map(engine.views.of, model.parameters()))
    _backward(engine)
    check_gradients(engine)
    left = mask_gradients(engine)
    norm = engine.clip(0.05)
    expected = torch.stack([value.norm() for value in left.values()]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-7)
    engine.step(torch.tensor(False))
    check_values_and_state(engine)
    _check_writes(engine)
    engine.close()
    return True


def _check_writes(engine):
    model = engine.module.model
    layer = model.model.layers[0].mlp.down_proj
    view = engine.views.of(layer.weight)
    beside = view.beside(layer.mask)
    assert (beside.piece, beside.grad, beside.states()) == (view.piece, None, {})
    view.value.copy_(view.index().float())
    beside.value.copy_(view.index() % 2 == 0)
    view.states()["exp_avg"].fill_(0.25)
    engine.views.publish([view, beside])
    numbers = torch.arange(layer.weight.numel()).view(layer.weight.shape)
    assert torch.equal(engine.full_parameter("model.layers.0.mlp.down_proj.weight"), numbers.float())
    assert torch.equal(engine.full_parameter("model.layers.0.mlp.down_proj.mask"), numbers % 2 == 0)
    state = engine.optimizer_state()["model.layers.0.mlp.down_proj.weight/exp_avg"]
    assert (local(state) == 0.25).all()
    with pytest.raises(ValueError, match="beside it"):
        view.beside(model.model.norm.weight)
    total = view.reduce(torch.tensor(view.value.numel()), "sum")
    assert int(total) == view.numel


def test_one_process():
    assert _check("single")


@pytest.mark.parametrize(
    ("kind", "world_size"), [("ddp", 2), ("fsdp", 2), ("fsdp", 3), ("kept whole", 2), ("hybrid", 4)]
)
def test_ranks(kind, world_size):
    assert all(run_ranks(_check, world_size, kind))


def _empty_pieces():
    engine = _engine("fsdp")
    sizes = [engine.views.of(p).value.numel() for p in engine.module.model.parameters()]
    return min(sizes)


def test_a_rank_may_hold_nothing():
    # 12 rows of a key projection over 5 ranks: 3, 3, 3, 3 and none.
    assert run_ranks(_empty_pieces, 5)[-1] == 0


def test_indices_of_boxes_and_spans():
    whole = torch.arange(4 * 3 * 5).view(4, 3, 5)
    box = Box((4, 3, 5), (1, 0, 2), (2, 3, 3))
    assert torch.equal(box.index(torch.device("cpu")), whole[1:3, :, 2:])
    assert torch.equal(Span((4, 3, 5), 7, 19).index(torch.device("cpu")), whole.flatten()[7:19])
    assert Box((4, 3), (4, 0), (0, 3)).index(torch.device("cpu")).shape == (0, 3)
