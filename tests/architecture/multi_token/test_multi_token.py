"""Multi-token prediction against its equations, document by document, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from leanmill.architecture.multi_token.rule import weight_in
from leanmill.architecture.multi_token.targets import labels_ahead, tokens_ahead
from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.technique import InstallContext
from leanmill.export import export_model
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.models.build import build_on_meta
from leanmill.models.compile import compile_blocks
from leanmill.models.config import ModelConfig
from leanmill.models.counting import num_active_parameters, num_parameters
from leanmill.models.materialise import make_materialiser
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.export.checkpoints import checkpoint_of
from tests.models.families import tiny_config


LENGTHS = ((7, 10), (3, 2, 12))
WEIGHT = 0.6


def batch_of() -> dict[str, Tensor]:
    """Two packed rows; labels are next tokens, never across documents, some masked as a prompt's are."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 97, (2, 17), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    labels[:, :-1][positions[:, 1:] == 0] = -100
    labels[0, 8:11] = -100
    return {"input_ids": ids, "position_ids": positions, "labels": labels}


def trained(
    family: str, depth: int, *more: dict[str, Any], attention: str = "sdpa", **changes: Any
) -> tuple[TrainModule, Any]:
    """A train module with values, and what was installed."""
    config = ModelConfig(config=tiny_config(family, **changes), attention=attention)  # type: ignore[arg-type]
    model = build_on_meta(config)
    context = InstallContext(load_frozen_model=lambda path: model, vocab_size=97, seed=0)
    techniques = [{"type": "multi_token", "depth": depth, "weight": WEIGHT}, *more]
    installed = install_techniques([parse_technique(one) for one in techniques], model, context)
    module = TrainModule(model, ledger=context.ledger)
    make_materialiser(config, seed=2)(module)
    return module.train(), installed


def chain_of(model: Any) -> Any:
    (around,) = model.base_model.norm.around.values()
    return around


def backward(module: TrainModule, installed: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Do as an engine does with one micro-batch; return gradients."""
    num_valid = (batch["labels"] != -100).sum().float()
    module.ledger.begin_step(token_scale=1 / num_valid, num_micro_batches=1)
    for rule in installed.step_rules:
        rule.begin_step(StepContext(step=0, num_steps=2, num_micro_batches=1))
    (module(batch)["total"] / num_valid).backward()
    return {name: p.grad.clone() for name, p in module.model.named_parameters() if p.grad is not None}


def by_hand(module: TrainModule, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[float]]:
    """arXiv:2412.19437, equations 21 to 25, each document run alone, so that nothing needs a mask.

    h_i^k = block_k(M_k [norm(emb(t_{i+k})); norm(h_i^{k-1})]) for i up to T - k, h^0 the model's last hidden
    state; L = sum_i -log p_i(t_{i+1}) / N + lambda / D sum_k sum_i -log p_i^k(t_{i+k+1}) / N.
    """
    model = module.model.eval()  # without the losses that the module adds
    chain, base = chain_of(model), model.base_model
    num_valid = int((batch["labels"] != -100).sum())
    total, sums = torch.zeros(()), [0.0] * len(chain.depths)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            ids, labels = (batch[key][row, start : start + length] for key in ("input_ids", "labels"))
            start += length
            hidden = base(input_ids=ids[None], use_cache=False).last_hidden_state
            total = total + F.cross_entropy(model.lm_head(hidden)[0], labels, ignore_index=-100, reduction="sum")
            for number, depth in enumerate(chain.depths.values(), 1):
                count = length - number
                if count < 1:
                    break
                joined = [
                    torch.cat([depth.enorm(base.embed_tokens(ids[i + number])), depth.hnorm(hidden[0, i])])
                    for i in range(count)
                ]
                rows = torch.stack([depth.eh_proj.weight @ x for x in joined])[None]
                positions = torch.arange(count)[None]
                rotary = base.rotary_emb(rows, positions)
                causal = torch.full((1, 1, count, count), -1e9).triu(1)
                made = depth.block(rows, attention_mask=causal, position_embeddings=rotary, position_ids=positions)
                hidden = depth.post_norm(made)
                for i in range(count):
                    if labels[i + number] == -100:  # t_{i+k+1}, which `labels` has at i + k
                        continue
                    loss = -torch.log_softmax(model.lm_head.weight @ hidden[0, i], -1)[labels[i + number]]
                    total = total + WEIGHT / len(sums) * loss
                    sums[number - 1] += float(loss.detach())
    (total / num_valid).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, [value / num_valid for value in sums]


@pytest.mark.parametrize(
    ("family", "depth", "attention"),
    [
        ("llama", 1, "sdpa"),
        ("llama", 3, "eager"),
        ("qwen3_moe", 2, "per_document"),
        ("deepseek_v3", 2, "sdpa"),
        ("pr_moe", 1, "sdpa"),
    ],
)
def test_losses_and_gradients_are_the_equations(family: str, depth: int, attention: str) -> None:
    module, installed = trained(family, depth, attention=attention)
    batch = batch_of()
    expected, losses = by_hand(module, batch)
    module.zero_grad()
    got = backward(module.train(), installed, batch)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=2e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    means, _ = module.ledger.means(module.ledger.take(), (batch["labels"] != -100).sum())
    assert [float(means[f"multi_token/{k}"]) for k in range(1, depth + 1)] == pytest.approx(losses, rel=1e-5)


def test_targets_never_cross_documents_nor_masks() -> None:
    batch = batch_of()
    for depth in (1, 2, 3, 16, 17, 20):
        labels, tokens = labels_ahead(batch, depth), tokens_ahead(batch, depth)
        for row, lengths in enumerate(LENGTHS):
            start = 0
            for length in lengths:
                for i in range(start, start + length):
                    inside = i + depth < start + length
                    assert labels[row, i] == (batch["labels"][row, i + depth] if inside else -100)
                    if inside:
                        assert tokens[row, i] == batch["input_ids"][row, i + depth]
                start += length


def test_recompute_compile_and_bf16_change_nothing_but_rounding() -> None:
    batch = batch_of()
    module, installed = trained("qwen3_moe", 2)
    expected = backward(module, installed, batch)
    module, installed = trained("qwen3_moe", 2)
    apply_activation_checkpointing(module.model, "full")
    for name, value in backward(module, installed, batch).items():
        assert torch.equal(value, expected[name]), name
    module, installed = trained("qwen3_moe", 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = backward(module, installed, batch)
    for name, value in got.items():
        if "experts" not in name and "gate" not in name:  # near ties go elsewhere
            assert (value - expected[name]).norm() <= 0.15 * expected[name].norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_compiled_blocks_compute_the_same(family: str, recompute: Any) -> None:
    batch = batch_of()
    module, installed = trained(family, 2)
    expected = backward(module, installed, batch)
    module, installed = trained(family, 2)
    apply_activation_checkpointing(module.model, recompute)
    compile_blocks(module.model)
    for name, value in backward(module, installed, batch).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_eval_is_the_plain_model_and_counts_leave_the_chain_out() -> None:
    module, _ = trained("qwen3_moe", 2)
    plain = build_on_meta(ModelConfig(config=tiny_config("qwen3_moe"), attention="sdpa"))
    make_materialiser(ModelConfig(config=tiny_config("qwen3_moe")), seed=2)(plain)
    batch = batch_of()
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        assert torch.equal(module.model.eval()(**inputs).logits, plain.eval()(**inputs).logits)
    assert num_active_parameters(module.model) == num_active_parameters(plain)
    one = sum(p.numel() for p in plain.model.layers[-1].parameters()) + 2 * 32 * 32 + 3 * 32
    assert num_parameters(module.model)[0] == num_parameters(plain)[0] + 2 * one
    assert len({id(block) for block in chain_of(module.model).blocks()}) == 2


def test_a_run_goes_on_bitwise_from_what_a_checkpoint_holds() -> None:
    from leanmill.parallel.launch import Ranks
    from tests.contract_training import FixedRows, full_parameters, recipe_of, train

    one = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    recipe = recipe_of(("multi_token",), {"type": "single"}, "", 1)
    whole, _ = train(recipe, one)
    first, loop = train(recipe, one, num_steps=2)
    rows = FixedRows()
    rows.position_tokens = loop.data.position_tokens
    second, loop = train(recipe, one, num_steps=0, data=rows)
    assert any("multi_token" in name for name in first.model_state())
    second.load_model_state(first.model_state())
    second.load_optimizer_state(first.optimizer_state())
    loop.step = 2  # the weight has fallen by then
    loop.train_step()
    expected = full_parameters(whole)
    assert all(torch.equal(value, expected[name]) for name, value in full_parameters(second).items())


def test_weight_falls_late_in_the_run() -> None:
    weights = [weight_in(step, 10, weight=0.3, late_weight=0.1, late_from=0.68) for step in range(10)]
    assert weights == [0.3] * 7 + [0.1] * 3


@pytest.mark.parametrize(
    ("family", "more", "expected"),
    [
        ("llama", [{"type": "multi_token"}], "listed twice"),
        ("llama", [{"type": "lora", "where": "branch", "targets": ["lm_head"]}], "leave the head out"),
    ],
)
def test_what_cannot_be_is_refused(family: str, more: list[dict], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        trained(family, 1, *more, tie_word_embeddings=False)


def test_another_family_s_folder_leaves_the_blocks_out_and_says_so(tmp_path: Path) -> None:
    _, checkpoint = checkpoint_of(tmp_path / "run", "llama", [{"type": "multi_token"}])
    report = export_model(checkpoint, tmp_path / "out")
    assert "blocks of multi_token are left out: llama has no place" in str(report)
    assert not any("eh_proj" in name for name in load_file(report.path / "model.safetensors"))
    lora = {"type": "lora", "rank": 2, "alpha": 4, "where": "branch"}
    _, checkpoint = checkpoint_of(tmp_path / "adapted", "llama", [{"type": "multi_token"}, lora])
    assert "blocks of multi_token are left out" in str(export_model(checkpoint, tmp_path / "adapter", to="adapter"))


def test_deepseek_s_folder_carries_the_blocks_where_transformers_looks(tmp_path: Path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    techniques = [{"type": "multi_token", "depth": 2}, {"type": "nm_sparsity"}]
    model, checkpoint = checkpoint_of(tmp_path / "run", "deepseek_v3", techniques)
    report = export_model(checkpoint, tmp_path / "out")
    assert "written as model.layers.2 to 3" in str(report)
    assert json.loads((report.path / "config.json").read_text())["num_nextn_predict_layers"] == 2
    main = AutoModelForCausalLM.from_pretrained(str(report.path), dtype=torch.float32).eval()
    # transformers knows the index of the released model alone.
    monkeypatch.setattr(main, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\..*"])
    drafter = MtpModel.from_pretrained(main)  # raises where a weight is missing
    chain = chain_of(model)
    for layer, depth in zip(drafter.layers, chain.depths.values(), strict=True):
        own = {name.replace("block.", "mtp_block.", 1): value for name, value in depth.state_dict().items()}
        assert own.keys() == layer.state_dict().keys()
        for name, value in layer.state_dict().items():
            assert torch.equal(value, own[name]), name
