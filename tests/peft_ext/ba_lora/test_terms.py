"""BA-LoRA's regularisers against their equations, and that the reference is the model before its adapter's start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from leanmill.core.errors import ConfigError
from leanmill.core.frozen_head import FrozenHead
from leanmill.export.folding import detach_adapters
from leanmill.models.build import build_on_meta
from leanmill.models.materialise import make_materialiser
from leanmill.models.pretrained import load_frozen
from leanmill.peft_ext.ba_lora.config import BaLora
from leanmill.peft_ext.ba_lora.terms import Consistency, Diversity, SingularValues, singular_values
from leanmill.recipe.io import validate_recipe
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import context, install, tiny, tokens
from tests.export.checkpoints import recipe_of, trained_model
from tests.peft_ext.peft.cases import raw_of


DTYPES = [torch.float32, torch.bfloat16]


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(got.float(), want.float(), **tolerance)


def drawn(dtype: torch.dtype, rows: int = 12, columns: int = 37) -> tuple[Any, Any, torch.Tensor]:
    """Logits twice, and labels of which four are missing, all of the last group among them."""
    logits = (3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))).to(dtype)
    labels = torch.arange(rows)
    labels[[1, *range(rows - 4, rows)]] = -100
    return logits.clone().requires_grad_(), logits.float().requires_grad_(), labels


@pytest.mark.parametrize("dtype", DTYPES)
def test_diversity_is_minus_the_entropy(dtype: torch.dtype):
    logits, twin, labels = drawn(dtype)
    got = Diversity(1.0)(logits, labels, {})
    want = sum((row.softmax(-1) * row.softmax(-1).log()).sum() for row in twin[labels != -100])
    close(got, want, dtype)
    got.backward()
    want.backward()
    close(logits.grad, twin.grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_largest", [1, 3])
def test_the_share_of_the_largest_singular_values(num_largest: int, dtype: torch.dtype):
    """-(sum of the k largest / sum of all) of the logits of four neighbours, as a mean over tokens with a label."""
    logits, twin, labels = drawn(dtype)
    got = SingularValues(1.0, num_largest, 4)(logits, labels, {})
    want = torch.zeros(())
    for group in range(3):
        rows = twin[4 * group : 4 * group + 4][labels[4 * group : 4 * group + 4] != -100]
        if len(rows):
            values = torch.linalg.svdvals(rows)
            want = want - len(rows) * values[:num_largest].sum() / values.sum()
    close(got, want, dtype)
    got.backward()
    want.backward()
    close(logits.grad, twin.grad, dtype)
    assert not logits.grad[labels == -100].any()


def test_equal_singular_values_have_a_gradient():
    """Where a decomposition would divide by their difference, and by a value that is zero."""
    matrix = torch.cat([torch.eye(3, 7), torch.zeros(1, 7)]).requires_grad_()
    singular_values(matrix).sum().backward()
    torch.testing.assert_close(matrix.grad, torch.cat([torch.eye(3, 7), torch.zeros(1, 7)]))


def batch_of(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    labels = ids.roll(-1, 1).clone()
    labels[:, -1], labels[0, :5] = -100, -100
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(ids.shape[1]).expand_as(ids).contiguous()}


def test_consistency_is_the_divergence_from_the_reference():
    torch.manual_seed(0)
    model, other = tiny("llama"), tiny("qwen3")
    term = Consistency(FrozenHead(context(other), "given", technique="ba_lora", role="reference"), 1.0)
    batch = batch_of(tokens(length=12))
    flat = {name: value.flatten(0, 1) for name, value in term.prepare(batch).items()}
    logits = model(batch["input_ids"]).logits.flatten(0, 1).detach().requires_grad_()
    twin = logits.detach().clone().requires_grad_()
    p, q = other(batch["input_ids"]).logits.flatten(0, 1).softmax(-1).detach(), twin.softmax(-1)
    valid = batch["labels"].flatten() != -100
    want = (p * (p / q).log()).sum(-1)[valid].sum()
    got = term(logits, batch["labels"].flatten(), flat)
    close(got, want, torch.float32)
    got.backward()
    want.backward()
    close(logits.grad, twin.grad, torch.float32)


def test_all_three_stand_in_the_loss_whatever_the_chunks():
    model, other = tiny("llama"), tiny("llama", hidden_size=16)
    raw = {"type": "ba_lora", "reference": "given", "consistency": 0.5, "diversity": 0.3, "singular_values": 0.2}
    terms = install(model, {**raw, "group_tokens": 4}, teacher=other).loss_terms
    assert [term.name for term in terms] == [
        f"ba_lora_{what}" for what in ("consistency", "diversity", "singular_values")
    ]
    batch = batch_of(tokens(length=12))
    found = {}
    for chunk in (24, 10):
        model.zero_grad()
        losses = TrainModule(model, terms, 1.0, chunk).train()(batch)
        losses["total"].backward()
        found[chunk] = ({k: v.detach() for k, v in losses.items()}, model.get_output_embeddings().weight.grad.clone())
    parts = found[24][0]
    weighted = sum(term.weight * parts[term.name] for term in terms)
    torch.testing.assert_close(parts["total"], parts["cross_entropy"] + weighted)
    for name, value in parts.items():
        torch.testing.assert_close(found[10][0][name], value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[10][1], found[24][1], rtol=1e-4, atol=1e-5)


def test_under_pissa_the_reference_is_the_original_model(tmp_path: Path):
    """Its base is what is left of the weight: without its adapter the model says something else."""
    trained_model(recipe_of("qwen3", [])).save_pretrained(tmp_path)
    plain = load_frozen(str(tmp_path))
    recipe = recipe_of("qwen3", [raw_of("lora", r=4, init_lora_weights="pissa")], path=tmp_path)
    model: Any = build_on_meta(recipe.model, vocab_size=None, device_type="cpu").eval()
    installed = install_techniques(recipe.techniques, model, context(vocab_size=97))
    make_materialiser(recipe.model, seed=0, fill_branches=installed.fill_branches)(model)
    ids = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(0))
    offered = context(plain, vocab_size=plain.config.vocab_size)
    (term, *_) = BaLora(reference="given").install(None, offered).loss_terms  # type: ignore[arg-type]
    extras = {name: value.flatten(0, 1) for name, value in term.prepare(batch_of(ids)).items()}

    @torch.no_grad()
    def divergence() -> float:
        return float(term(model(ids).logits.flatten(0, 1), batch_of(ids)["labels"].flatten(), extras))

    assert divergence() == pytest.approx(0.0, abs=1e-4)
    detach_adapters(model)
    assert divergence() > 1e-2


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"consistency": 0, "diversity": 0, "singular_values": 0}, "three weights of 0"),
        ({}, "set ba_lora.reference to the folder or hub name in model.path"),
        ({"consistency": 0, "reference": "given"}, "read for consistency alone"),
        ({"reference": "given", "group_tokens": 3}, "set num_largest below it"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], expected: str):
    with pytest.raises((ValidationError, ValueError), match=expected):
        BaLora(**changes)


def test_a_row_must_be_whole_groups():
    recipe = {
        "model": {"config": {"model_type": "llama"}},
        "data": {"sequence_length": 60},
        "batch": {"tokens_per_step": 240, "tokens_per_micro_batch": 120},
        "train": {"steps": 1},
        "techniques": [{"type": "lora"}, {"type": "ba_lora", "reference": "given"}],
    }
    with pytest.raises(
        ConfigError, match=r"group_tokens=32 must divide data\.sequence_length=60; set .*group_tokens=30"
    ):
        validate_recipe(recipe)
    with pytest.raises(ConfigError, match="does not divide the 13 tokens of a row"):
        SingularValues(1.0, 3, 32).prepare(batch_of(tokens(1, 13)))
