from __future__ import annotations

import copy

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F  # noqa: N812

from leanmill.architecture.stochastic_depth.config import StochasticDepth
from leanmill.architecture.stochastic_depth.schedule import exit_weights
from leanmill.core.errors import ConfigError
from leanmill.core.noise import derive_seed, uniform
from leanmill.core.rules import StepContext
from leanmill.core.sites import Sites
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import context, tiny, tokens


ROWS = torch.tensor([3, 40, 7, 11, 12, 5])


def _batch(num_rows=6, length=9):
    ids = tokens(num_rows, length)
    labels = ids.roll(-1, 1)
    labels[:, -1] = labels[0, 2] = -100
    positions = torch.arange(length).expand(num_rows, -1).contiguous()
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "row_ids": ROWS[:num_rows]}


def _module(*, family="llama", step=0, num_steps=10, weight=1.0, others=(), mode="none", **fields):
    model = tiny(family, num_hidden_layers=4).train()
    offered = context(seed=5, cross_entropy_weight=weight)
    techniques = install_techniques([StochasticDepth(**fields), *others], model, offered)
    module = TrainModule(model, techniques.loss_terms, weight, ledger=offered.ledger).train()
    apply_activation_checkpointing(model, mode)
    for rule in techniques.step_rules:
        rule.check()
        rule.begin_step(StepContext(step=step, num_steps=num_steps, num_micro_batches=1))
    offered.ledger.begin_step(token_scale=torch.tensor(1.0), num_micro_batches=1)
    return module


def _kept(layer, rate, step=0):
    key = torch.tensor([derive_seed(5, f"stochastic_depth/model.layers.{layer}", step)])
    return uniform(key, ROWS) >= rate


def _forward(model, ids, kept, rates=None):
    """The stream after each block, with x + M f(x) written out; f by the block's own parts."""
    body = model.model
    hidden = body.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    angles = body.rotary_emb(hidden, positions)
    causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None].to(hidden.dtype)
    streams = []
    for layer, block in enumerate(body.layers):
        after = (
            hidden
            + block.self_attn(
                hidden_states=block.input_layernorm(hidden), position_embeddings=angles, attention_mask=causal
            )[0]
        )
        branch = after + block.mlp(block.post_attention_layernorm(after)) - hidden
        mask = kept[layer].to(hidden.dtype)[:, None, None]
        hidden = hidden + mask * branch / (1.0 if rates is None else 1 - rates[layer])
        streams.append(hidden)
    return streams


def _loss(model, hidden, labels):
    logits = model.lm_head(model.model.norm(hidden))
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")


def _compare(module, batch, reference, expected, rtol=1e-4, atol=1e-5):
    losses = module(batch)
    losses["total"].backward()
    expected.backward()
    grads = dict(reference.named_parameters())
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, grads[name].grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    return losses


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_are_dropped_as_the_formula_says_values_and_gradients(rescale, mode, dtype):
    module, batch = _module(rate=0.6, rescale=rescale, mode=mode), _batch()
    module.model.to(dtype)
    reference = tiny("llama", num_hidden_layers=4).to(dtype)
    rates = [0.6 * (2 ** (layer / 3) - 1) for layer in range(4)]
    kept = [_kept(layer, rate) for layer, rate in enumerate(rates)]
    assert all(kept[0])
    assert 0 < sum(int(mask.sum()) for mask in kept[1:]) < 18
    streams = _forward(reference, batch["input_ids"], kept, rates if rescale else None)
    losses = _compare(module, batch, reference, _loss(reference, streams[-1], batch["labels"]))
    torch.testing.assert_close(
        losses["total"], _loss(reference, streams[-1], batch["labels"]).float(), rtol=1e-5, atol=0
    )


def test_bf16_drops_the_same_rows():
    module, batch = _module(rate=0.6), _batch()
    blocks = [place.module for place in Sites(module.model).modules("block")]
    seen = {}
    for index, block in enumerate(blocks):
        block.register_forward_hook(lambda _, args, out, i=index: seen.__setitem__(i, (out == args[0]).all(-1).all(-1)))
    module.model.bfloat16()
    module(batch)
    for layer in range(4):
        assert torch.equal(~seen[layer], _kept(layer, 0.6 * (2 ** (layer / 3) - 1))), layer


def test_a_row_is_dropped_whatever_else_is_in_its_micro_batch_and_differently_in_the_next_step():
    whole = _module(rate=0.6)
    batch = _batch()
    expected = whole(batch)["total"]
    parts = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, 6))]
    torch.testing.assert_close(sum(whole(part)["total"] for part in parts), expected)
    assert not torch.allclose(_module(rate=0.6, step=1)(batch)["total"], expected)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_a_step_drops_whole_blocks_which_then_do_not_run_and_get_gradients_of_zero(mode):
    calls = []
    step = next(s for s in range(99) if 0 < sum(_dropped_by_step(s)) < 4)
    module = _module(rate=0.5, over_layers="uniform", granularity="batch", step=step, mode=mode)
    for layer, block in enumerate(module.model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *call, n=layer: calls.append(n))
    reference, batch, dropped = tiny("llama", num_hidden_layers=4), _batch(), _dropped_by_step(step)
    kept = [torch.full((6,), not is_dropped) for is_dropped in dropped]
    streams = _forward(reference, batch["input_ids"], kept)
    _compare(module, batch, reference, _loss(reference, streams[-1], batch["labels"]))
    assert set(calls) == {layer for layer in range(4) if not dropped[layer]}
    gone = module.model.model.layers[dropped.index(True)]
    assert all(torch.count_nonzero(p.grad) == 0 for p in gone.parameters())


def _dropped_by_step(step):
    return [derive_seed(5, f"stochastic_depth/model.layers.{layer}", step) / 2**63 < 0.5 for layer in range(4)]


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_early_exits_are_the_papers_loss_values_and_gradients(curriculum, family):
    fields = {"rate": 0.3, "early_exit": {"scale": 0.5, "curriculum": curriculum, "rotation": 2}}
    module, batch = _module(family=family, step=3, weight=0.5, **fields), _batch()
    reference = tiny(family, num_hidden_layers=4)
    kept = [_kept(layer, 0.3 * (2 ** (layer / 3) - 1), 3) for layer in range(4)]
    weights = exit_weights(4, 3, 10, scale=0.5, curriculum=curriculum, rotation=2)
    streams = _forward(reference, batch["input_ids"], kept)
    exits = [_loss(reference, stream, batch["labels"]) for stream in streams]
    expected = 0.5 * sum(weight * loss for weight, loss in zip(weights, exits, strict=True))
    losses = _compare(module, batch, reference, expected)
    torch.testing.assert_close(losses["cross_entropy"], exits[-1].detach(), rtol=1e-5, atol=0)
    value, in_total, _ = module.ledger.take()[0]
    torch.testing.assert_close(losses["total"].detach() + in_total, expected.detach(), rtol=1e-5, atol=0)
    early = sum(weights[:-1])
    mean = sum(w * loss.item() for w, loss in zip(weights[:-1], exits[:-1], strict=True)) / early
    torch.testing.assert_close(float(value), mean, rtol=1e-5, atol=0)


def test_early_exits_beside_distillation_share_cross_entropy_only():
    from leanmill.distill.logits.config import Distill

    fields = {"rate": 0.0, "early_exit": {"scale": 1.0, "curriculum": "all"}}
    model, teacher, batch = tiny("llama", num_hidden_layers=4).train(), tiny(seed=3), _batch()
    offered = context(teacher, seed=5)
    techniques = install_techniques([StochasticDepth(**fields), Distill(teacher="T", weight=0.3)], model, offered)
    module = TrainModule(model, techniques.loss_terms, ledger=offered.ledger).train()
    for rule in techniques.step_rules:
        rule.begin_step(StepContext(step=0, num_steps=2, num_micro_batches=1))
    offered.ledger.begin_step(token_scale=torch.tensor(1.0), num_micro_batches=1)
    losses = module(batch)
    last = exit_weights(4, 0, 2, scale=1.0, curriculum="all", rotation=1)[-1]
    torch.testing.assert_close(losses["total"], last * losses["cross_entropy"] + 0.3 * losses["distill"])


@pytest.mark.parametrize("family", ["gemma2", "cohere", "gpt_neox", "gpt2", "qwen3_moe"])
def test_an_exit_is_the_model_cut_off_there_in_every_family(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "pad_token_id": 0}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "moe_intermediate_size": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), attn_implementation="eager").eval()
    offered, batch = context(seed=5), _batch(2)
    cut = copy.deepcopy(model)
    layers = Sites(cut).modules("block")
    parent = cut.get_submodule(layers[0].name.rpartition(".")[0])
    del parent[2:]
    logits = cut(input_ids=batch["input_ids"], use_cache=False).logits
    expected = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")
    exits = {"curriculum": "rotational", "rotation": 3}
    techniques = install_techniques([StochasticDepth(rate=0.0, early_exit=exits)], model, offered)
    for rule in techniques.step_rules:
        rule.begin_step(StepContext(step=1, num_steps=2, num_micro_batches=1))
    module = TrainModule(model, ledger=offered.ledger)
    offered.ledger.train()
    for block in Sites(model).modules("block"):  # dropout of the model itself stays off
        if "around" in block.module._modules:
            block.module.around.train()
    offered.ledger.begin_forward(batch)
    module.model(input_ids=batch["input_ids"], use_cache=False)
    torch.testing.assert_close(offered.ledger.take()[0, 0], expected.detach(), rtol=1e-5, atol=1e-5)


def test_in_eval_mode_nothing_happens():
    module, batch, plain = _module(rate=0.9, early_exit={}), _batch(), tiny("llama", num_hidden_layers=4)
    got, expected = module.eval()(batch), TrainModule(plain)(batch)
    assert torch.equal(got["total"], expected["total"])
    assert module.ledger.take().count_nonzero() == 0


@pytest.mark.parametrize("granularity", ["row", "batch"])
def test_a_compiled_block_has_no_more_graphs_than_decisions(granularity):
    from torch._dynamo.utils import counters

    batch = _batch()
    expected = _module(rate=0.5, over_layers="uniform", granularity=granularity)
    module = _module(rate=0.5, over_layers="uniform", granularity=granularity)
    torch._dynamo.reset()
    counters.clear()
    for block in module.model.model.layers:
        block.compile(fullgraph=True, backend="aot_eager")
    module(batch)["total"].backward()
    expected(batch)["total"].backward()
    grads = dict(expected.model.named_parameters())
    for name, parameter in module.model.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name].grad, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] <= (1 if granularity == "row" else 2)


def test_bad_input_says_what_to_type():
    with pytest.raises(ValidationError, match=r"does nothing; set rate: 0.1"):
        StochasticDepth(rate=0)
    from leanmill.recipe.root import Recipe

    raw = {
        "model": {"config": {"model_type": "llama"}},
        "train": {"steps": 1},
        "techniques": [{"type": "stochastic_depth", "granularity": "batch"}],
        "engine": {"type": "deepspeed", "stage": 3},
    }
    with pytest.raises(ValidationError, match=r"set stochastic_depth.granularity=row, or engine.stage=2"):
        Recipe.model_validate(raw)
    Recipe.model_validate(raw | {"engine": {"type": "deepspeed", "stage": 2}})
    with pytest.raises(ConfigError, match="given no seed"):
        install_techniques([StochasticDepth()], tiny(), context(seed=None))
    lora = {"type": "lora", "rank": 2, "alpha": 2, "where": "branch", "targets": ["lm_head"]}
    from leanmill.core.registry import parse_technique

    with pytest.raises(ConfigError, match="leave the head out"):
        install_techniques([StochasticDepth(early_exit={}), parse_technique(lora)], tiny(), context())
