"""Hidden states against their papers' equations: values and gradients, alone and beside other distillation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.distill.hidden.distance import distance
from leanmill.distill.layers import pairs_of
from leanmill.export.folding import fold
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import VOCAB_SIZE, context, tiny, tokens


WEIGHT, STUDENT_LAYERS, TEACHER_LAYERS, TEACHER_WIDTH = 0.25, 2, 4, 24


def by_hand(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    if kind == "mse":
        return ((student - teacher) ** 2).sum(-1) / student.shape[-1]
    if kind == "cosine":
        return 1 - (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    return ((student - teacher) ** 2).sum(-1) / (teacher**2).sum(-1)


@pytest.mark.parametrize("shape", [(7,), (3, 5, 33)])
@pytest.mark.parametrize("kind", ["mse", "cosine", "normalised_mse"])
def test_distances(kind, shape):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    twin = student.detach().clone().requires_grad_()
    got, expected = distance(student, teacher, kind), by_hand(twin, teacher, kind)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["mse", "cosine", "normalised_mse"])
def test_bf16_states_are_compared_in_fp32(kind):
    student, teacher = (20 * torch.randn(6, 40)).bfloat16(), (20 * torch.randn(6, 40)).bfloat16()
    got = distance(student, teacher, kind)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, by_hand(student.float(), teacher.float(), kind), rtol=1e-4, atol=1e-5)


def test_which_layer_learns_from_which():
    assert pairs_of("uniform", 4, 12, "t", technique="hidden_distill") == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert pairs_of("uniform", 3, 3, "t", technique="hidden_distill") == [(0, 0), (1, 1), (2, 2)]
    assert pairs_of("uniform", 4, 2, "t", technique="hidden_distill") == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert pairs_of("last", 3, 7, "t", technique="hidden_distill") == [(2, 6)]
    assert pairs_of([(0, 3), (-1, -1)], 2, 5, "t", technique="hidden_distill") == [(0, 3), (1, 4)]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([(2, 0)], r"the student has no layer 2; it has 2: set one of 0 to 1"),
        ([(0, -6)], r"teacher big/one has no layer -6; it has 5: set one of 0 to 4"),
        ([], "layers: last"),
        ([(1, 1), (-1, 1)], r"the pair \[1, 1\] is there twice"),
    ],
)
def test_layers_that_are_not_there_are_refused_in_one_line(layers, message):
    with pytest.raises(ConfigError, match=message) as error:
        pairs_of(layers, 2, 5, "big/one", technique="hidden_distill")
    assert "\n" not in str(error.value)


def test_the_students_layers_are_checked_where_no_teacher_is():
    with pytest.raises(ConfigError, match="the student has no layer 9"):
        install_techniques([technique(layers=[(9, 0)])], tiny(), context())
    model = tiny()
    install_techniques([technique(layers=[(1, 99)])], model, context())
    assert not [name for name, _ in model.named_parameters() if "around" in name]


def technique(**fields):
    return parse_technique({"type": "hidden_distill", "teacher": "t", "weight": WEIGHT, **fields})


def batch_of(seed: int) -> dict[str, Tensor]:
    ids = tokens(2, 13, seed=seed)
    labels = ids.roll(-1, 1).clone()
    labels[:, -1] = -100
    labels[0, : 4 + seed] = -100
    positions = torch.cat([torch.arange(6), torch.arange(7)]).expand(2, -1).contiguous()
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def teacher_model(**changes):
    return tiny(seed=9, hidden_size=TEACHER_WIDTH, num_hidden_layers=TEACHER_LAYERS, **changes)


def module_of(*techniques, teacher=None, mode="none", **changes):
    model, offered = tiny(**changes), context(teacher or teacher_model())
    installed = install_techniques(list(techniques), model, offered)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "around" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    module = TrainModule(model, installed.loss_terms, 0.5, ledger=offered.ledger).train()
    apply_activation_checkpointing(model, mode)
    return module


def states_of(model, batch) -> list[Tensor]:
    found = []
    hooks = [block.register_forward_hook(lambda *call: found.append(call[-1])) for block in model.model.layers]
    model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def gradients_by_hand(maps, pairs, kind, batches) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """Gradients of the model and of the maps, and the mean loss of each pair."""
    student, teacher = tiny(), teacher_model()
    maps = [m.detach().clone().requires_grad_() for m in maps]
    num_valid = sum((batch["labels"] != -100).sum() for batch in batches)
    total, values = torch.zeros(()), torch.zeros(len(pairs))
    for batch in batches:
        with torch.no_grad():
            targets = states_of(teacher, batch)
        states, has_label = states_of(student, batch), batch["labels"] != -100
        logits = student(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")
        total = total + 0.5 * loss / num_valid
        for index, (mine, its) in enumerate(pairs):
            per_token = by_hand(states[mine] @ maps[index].T, targets[its], kind)
            value = per_token[has_label].sum() / num_valid
            values[index] += value.detach()
            total = total + WEIGHT / len(pairs) * value
    total.backward()
    return {n: p.grad for n, p in student.named_parameters()}, [m.grad for m in maps], values


def step(module: TrainModule, batches) -> Tensor:
    num_valid = sum((batch["labels"] != -100).sum() for batch in batches).float()
    module.ledger.begin_step(token_scale=1 / num_valid, num_micro_batches=len(batches))
    for batch in batches:
        (module(batch)["total"] / num_valid).backward()
    return num_valid


def maps_of(module: TrainModule) -> list[Tensor]:
    return [p for n, p in module.model.named_parameters() if "around" in n]


@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.parametrize("compiled", [False, True])
def test_equals_plain_autograd(mode, compiled):
    kind, pairs = "normalised_mse", [(0, 1), (1, 3)]
    module = module_of(technique(loss=kind), mode=mode)
    if compiled:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        for block in module.model.model.layers:
            block.compile(backend="aot_eager")
    batches = [batch_of(0), batch_of(1)]
    num_valid = step(module, batches)
    gradients, of_maps, values = gradients_by_hand(maps_of(module), pairs, kind, batches)
    for name, gradient in gradients.items():
        torch.testing.assert_close(module.model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    for parameter, gradient in zip(maps_of(module), of_maps, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    means, weighted = module.ledger.means(module.ledger.take(), num_valid)
    assert list(means) == ["hidden_distill", "hidden_distill/0-1", "hidden_distill/1-3"]
    torch.testing.assert_close(torch.stack(list(means.values())[1:]), values)
    torch.testing.assert_close(weighted, WEIGHT * values.mean())
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_other_losses(kind):
    module = module_of(technique(loss=kind, layers=[(-1, 0)]))
    batches = [batch_of(2)]
    step(module, batches)
    gradients, of_maps, _ = gradients_by_hand(maps_of(module), [(1, 0)], kind, batches)
    for name, gradient in gradients.items():
        torch.testing.assert_close(module.model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps_of(module)[0].grad, of_maps[0], rtol=1e-4, atol=1e-6)


def test_equal_widths_need_no_map_and_get_one_where_asked():
    same = tiny(seed=9)
    assert not maps_of(module_of(technique(), teacher=same))
    assert [m.shape for m in maps_of(module_of(technique(linear_map="always"), teacher=same))] == [(32, 32)] * 2


def test_the_fused_loss_is_the_same_number_with_and_without():
    batch = batch_of(0)
    with_it, without = module_of(technique())(batch), module_of()(batch)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(with_it[name], value) for name, value in without.items())


def test_one_forward_of_the_teacher_serves_all():
    teacher, calls = teacher_model(), []
    teacher.base_model.register_forward_pre_hook(lambda *call: calls.append(1))
    terms = [parse_technique({"type": "distill", "teacher": "t"}), technique(), technique(layers="last", loss="cosine")]
    module = module_of(*terms, teacher=teacher)
    batches = [batch_of(0), batch_of(1)]
    num_valid = step(module, batches)
    assert len(calls) == 2, "once a micro-batch"
    means, _ = module.ledger.means(module.ledger.take(), num_valid)
    assert {"hidden_distill", "hidden_distill_2", "hidden_distill_2/1-3"} <= means.keys()
    assert module(batch_of(0)).keys() == {"cross_entropy", "distill", "total"}


def test_eval_runs_no_teacher_and_an_export_drops_the_maps():
    teacher = teacher_model()
    teacher.forward = None
    module, batch = module_of(technique(), teacher=teacher).eval(), batch_of(0)
    plain = TrainModule(tiny(), (), 0.5).eval()
    assert torch.equal(module(batch)["total"], plain(batch)["total"])
    fold(module.model)
    assert list(module.model.state_dict()) == list(plain.model.state_dict())
    assert torch.equal(module(batch)["total"], plain(batch)["total"])


def test_another_vocabulary_is_refused_at_installation():
    with pytest.raises(ConfigError, match=rf"teacher t has a vocabulary of 70 .*{VOCAB_SIZE}"):
        module_of(technique(), teacher=teacher_model(vocab_size=70))
