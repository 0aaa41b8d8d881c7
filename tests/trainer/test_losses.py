"""Losses inside the head's call: equal to those from logits, on every engine, for the families it knows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from leanmill.core.head import _KNOWN_FAMILIES
from leanmill.core.head_loss import is_plain_head
from leanmill.core.site import LinearSite
from leanmill.core.stage import Slot, Stage
from leanmill.distill.logits.config import Distill
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import FsdpEngine, SingleEngine
from leanmill.parallel.deepspeed import DeepSpeedEngine
from leanmill.trainer.loss_paths import FromLogits
from leanmill.trainer.losses import loss_in_head
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import FAMILIES, context, term_of, tiny
from tests.distributed import run_ranks
from tests.parallel import cases


_SPECIAL = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 16},
    "gemma3_text": {"final_logit_softcapping": 0.5, "head_dim": 16},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 2, "num_experts_per_tok": 1},
    "nanochat": {"final_logit_softcapping": 0.5},
    "vaultgemma": {"final_logit_softcapping": 0.5, "head_dim": 16},
}


def model_of(family, **changes):
    if family in FAMILIES:
        return tiny(family, **changes)
    config = AutoConfig.for_model(
        family,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **changes,
    )
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


def batch_of(rows=3, length=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(61, (rows, length), generator=generator)
    labels = torch.randint(61, (rows, length), generator=generator)
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).expand(rows, -1).contiguous()}


def from_logits(model, batch):
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def count_head_rows(model):
    """Tokens whose logits the head really made, call by call."""
    rows, head = [], model.get_output_embeddings()
    linear = type(head).forward
    type(head).forward, restore = (
        lambda self, x: (rows.append(x.shape[:-1].numel()) if self is head else None, linear(self, x))[1],
        linear,
    )
    return rows, lambda: setattr(type(head), "forward", restore)


@pytest.fixture
def head_rows():
    undo = []

    def watch(model):
        rows, restore = count_head_rows(model)
        undo.append(restore)
        return rows

    yield watch
    for restore in undo:
        restore()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *_SPECIAL])
def test_loss_and_gradients_are_those_of_logits(family, tied, head_rows):
    model = model_of(family, tie_word_embeddings=tied, **_SPECIAL.get(family, {}))
    batch, module = batch_of(), TrainModule(model, chunk_tokens=8)
    expected = from_logits(model, batch)
    expected.backward()
    wanted, rows = gradients(model), head_rows(model)
    losses = module(batch)
    losses["total"].backward()
    assert rows == []
    torch.testing.assert_close(losses["cross_entropy"], expected)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_every_known_family_is_checked_above():
    assert sorted(_KNOWN_FAMILIES) == sorted(_SPECIAL)


class _Scales(LlamaForCausalLM):
    def forward(self, **inputs):
        found = super().forward(**inputs)
        found.logits = found.logits * 0.5
        return found


class _Cuts(LlamaForCausalLM):
    def forward(self, **inputs):
        found = super().forward(**inputs)
        found.logits = found.logits[..., :-3]
        return found


class _Adds(LlamaForCausalLM):
    def forward(self, **inputs):
        found = super().forward(**inputs)
        found.logits = found.logits + self.lm_head(torch.ones(1, 1, self.config.hidden_size))
        return found


@pytest.mark.parametrize("kind", [_Scales, _Cuts, _Adds])
def test_families_that_do_more_are_noticed_and_get_logits(kind, head_rows):
    model = kind(tiny().config)
    batch = batch_of()
    batch["labels"].clamp_(max=57)
    expected = from_logits(model, batch)
    module, rows = TrainModule(model), head_rows(model)
    for _ in range(2):
        torch.testing.assert_close(module(batch)["cross_entropy"], expected)
    assert rows.count(21) == 2
    assert model.lm_head(torch.zeros(1, model.config.hidden_size)).shape == (1, model.config.vocab_size)


def test_hooks_of_the_head_run_and_its_body_comes_back_after_an_error():
    model, calls = tiny(), []
    model.lm_head.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.lm_head.register_forward_hook(lambda module, args, output: calls.append("after"))
    TrainModule(model)(batch_of())
    assert calls == ["before", "after"]

    def fail(*operands):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        loss_in_head(model, {"input_ids": batch_of()["input_ids"]}, 21, fail)
    assert model.lm_head(torch.zeros(1, model.config.hidden_size)).shape == (1, model.config.vocab_size)


class _Halved(Stage):
    slot, technique = Slot.QUANT, "halved"

    def forward(self, weight):
        return weight * 0.5


def test_a_staged_head_uses_its_staged_weight(head_rows):
    model = tiny()
    model.lm_head = LinearSite.adopt(model.lm_head, "lm_head")
    model.lm_head.put(_Halved())
    batch = batch_of()
    expected = from_logits(model, batch)
    expected.backward()
    wanted, rows = gradients(model), head_rows(model)
    total = TrainModule(model)(batch)["total"]
    total.backward()
    assert rows == []
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_around_the_head_is_left_to_it():
    model = tiny()
    assert is_plain_head(model.lm_head)
    model.lm_head = nn.Sequential(model.lm_head)
    assert not is_plain_head(model.lm_head)
    torch.testing.assert_close(TrainModule(model)(batch_of())["total"], from_logits(model, batch_of()))


def test_autocast_multiplies_in_bf16_and_sums_in_fp32():
    model, batch = tiny(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        expected = from_logits(model, batch)
        got = TrainModule(model)(batch)["total"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    assert got.item() != TrainModule(model)(batch)["total"].item()
    got.backward()
    assert model.lm_head.weight.grad.dtype == torch.float32


def test_evaluation_builds_no_gradients():
    model, batch = tiny(), batch_of()
    with torch.no_grad():
        losses = TrainModule(model).eval()(batch)
    assert not losses["total"].requires_grad
    torch.testing.assert_close(losses["cross_entropy"], from_logits(model, batch).detach())


def trained(kind, tied):
    """Three steps of the tiny model on an engine; also how often its head made logits."""
    if kind == "zero3":
        from leanmill.parallel import config as configs

        config = configs.DeepSpeedEngine(stage=3)
        engine = DeepSpeedEngine(config, device=torch.device("cpu"), precision="fp32", persist_below=0)
    else:
        config = FsdpEngine() if kind == "fsdp" else SingleEngine()
        engine, _ = build_engine(config, ranks=cases.ranks_here(), precision="fp32", model_bytes=0)
    plain = cases.make_module(torch.float32, tied=tied).model
    module = TrainModule(plain, chunk_tokens=10 if kind != "reference" else "auto")
    if kind == "reference":
        module.use_logits()
    preparation = cases.preparation(lambda live: cases.adamw(live, foreach=False))
    engine.prepare(module, preparation)
    found = cases.train(engine, max_norm=None)
    found["evaluated"] = engine.evaluate(cases.rows(9))["cross_entropy"].item()
    assert isinstance(module._paths[False], FromLogits) == (kind == "reference")
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["single", "fsdp", "zero3"])
def test_engines_train_as_from_logits_on_one_process(kind, tied):
    if kind == "zero3":
        pytest.importorskip("deepspeed")
    wanted = trained("reference", tied)
    results = [trained(kind, tied)] if kind == "single" else run_ranks(lambda: trained(kind, tied), 2)
    for name, value in wanted["weights"].items():
        for result in results:
            torch.testing.assert_close(result["weights"][name], value, rtol=1e-4, atol=1e-4)
    for name, value in wanted["gradients"].items():
        torch.testing.assert_close(results[0]["gradients"][name], value, rtol=1e-3, atol=1e-4)
    assert results[0]["evaluated"] == pytest.approx(wanted["evaluated"], rel=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_distillation_beside_cross_entropy_is_that_of_logits(divergence, weight, head_rows):
    model, teacher = tiny(), tiny(seed=9, hidden_size=24)
    config = Distill(teacher="t", divergence=divergence, temperature=2.0, weight=0.3)
    batch = batch_of()
    whole = TrainModule(model, [term_of(config, context(teacher))], weight)
    whole.use_logits()
    expected = whole(batch)
    expected["total"].backward()
    wanted, rows = gradients(model), head_rows(model)
    losses = TrainModule(model, [term_of(config, context(teacher))], weight, chunk_tokens=8)(batch)
    losses["total"].backward()
    assert rows == []
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-4)
    assert all(p.grad is None for p in teacher.parameters())


def test_distillation_under_autocast_and_from_a_teacher_with_a_head_of_its_own():
    model, teacher = tiny(), tiny(seed=9)
    batch = batch_of()
    module = TrainModule(model, [term_of(Distill(teacher="t"), context(teacher))])
    with torch.autocast("cpu", torch.bfloat16):
        fused = module(batch)
        module.use_logits()
        whole = module(batch)
    torch.testing.assert_close(fused, whole, rtol=2e-2, atol=2e-2)
    module._paths.clear()
    expected = module(batch)
    teacher.lm_head = nn.Sequential(teacher.lm_head)
    torch.testing.assert_close(module(batch), expected)
