"""Techniques on a model that another loop trains."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

import leanmill
from leanmill.core.errors import ConfigError
from leanmill.core.sites import iter_sites
from leanmill.integrations import attached_to, export
from leanmill.parallel.tensors import global_norm, scale_to_norm
from tests.integrations.setting import LENGTH, LR, NUM_ROWS, Rows, llama, ours


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    llama().save_pretrained(folder / "model")
    llama(3).save_pretrained(folder / "teacher")
    return folder


def trained_here(model, attached, num_steps):
    """A loop of somebody's own: two micro-batches a step, the loss a mean over the targets of both."""
    optimizer = attached.optimizer(lr=LR, weight_decay=0.01, eps=1e-6)
    rows = Rows(num_steps)
    model.train()
    for step in range(num_steps):
        batch = rows.next_rows(NUM_ROWS, rank=0, world_size=1)
        num_targets = (batch["labels"] != -100).sum()
        attached.begin_step(step, num_steps=num_steps, num_micro_batches=2, optimizer=optimizer)
        for ids, labels in zip(batch["input_ids"].chunk(2), batch["labels"].chunk(2), strict=True):
            model(input_ids=ids, labels=ids, shift_labels=labels, num_items_in_batch=num_targets).loss.backward()
        attached.before_optimizer()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        scale_to_norm(gradients, global_norm(gradients, torch.device("cpu")), 0.5)
        optimizer.step()
        attached.after_optimizer()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "techniques",
    [
        # A loss inside the model, noise in the input, adapters.
        [{"type": "hidden_distill", "teacher": "TEACHER"}, {"type": "neftune"}, {"type": "lora", "rank": 2}],
        pytest.param(
            [{"type": "nm_sparsity", "decay": 1e-3}, {"type": "distill", "teacher": "TEACHER"}], marks=pytest.mark.slow
        ),
        pytest.param([{"type": "gradual_pruning", "sparsity": 0.5}], marks=pytest.mark.slow),
        pytest.param([{"type": "peft", "method": "vera"}], marks=pytest.mark.slow),
        pytest.param([{"type": "ternary"}, {"type": "stochastic_depth"}], marks=pytest.mark.slow),
    ],
    ids=lambda techniques: "-".join(one["type"] for one in techniques),
)
def test_an_own_loop_trains_the_weights_of_our_trainer(folders, techniques):
    given = [
        {key: str(folders / "teacher") if value == "TEACHER" else value for key, value in one.items()}
        for one in techniques
    ]
    expected = ours(folders / "model", given, num_steps=4)
    model = llama()
    trained_here(model, leanmill.attach(model, given), 4)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].detach().float(), weight.float(), rtol=1e-5, atol=1e-5, msg=name)


def test_losses_inside_the_model_count_by_targets_and_not_by_micro_batches(folders):
    """Where the caller takes each micro-batch's mean, a ledger's loss is a mean of means too."""
    techniques = [{"type": "hidden_distill", "teacher": str(folders / "teacher"), "weight": 3.0}]
    batch = Rows(1).next_rows(NUM_ROWS, rank=0, world_size=1)
    gradients = []
    for chunks in (1, 2):
        model = llama()
        attached = leanmill.attach(model, techniques)
        attached.losses.loss_scale = (
            2.0  # of a caller that divides by the targets of two ranks, which this one does not
        )
        attached.begin_step(0, num_steps=1, num_micro_batches=chunks)
        for ids in batch["input_ids"].chunk(chunks):  # every token has a target: both ways are one
            (model.train()(input_ids=ids, labels=ids).loss / chunks).backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)
    plain = llama()
    plain.train()(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss.backward()
    assert not torch.allclose(plain.model.layers[0].mlp.up_proj.weight.grad, gradients[0], rtol=1e-2)


def test_an_adapter_of_peft_is_started_from(folders, tmp_path):
    torch.manual_seed(1)
    given = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(LlamaForCausalLM.from_pretrained(folders / "model", dtype=torch.float32), given)
    adapted.save_pretrained(tmp_path)
    ids = Rows(1).ids[:2]
    with torch.no_grad():
        expected, plain = adapted.eval()(ids).logits, llama().eval()(ids).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
    for model in (LlamaForCausalLM.from_pretrained(folders / "model", dtype=torch.float32), llama()):
        leanmill.attach(model, [{"type": "peft", "path": str(tmp_path)}])
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(ids).logits, expected, rtol=1e-4, atol=1e-5)
    other = LlamaForCausalLM.from_pretrained(folders / "teacher", dtype=torch.float32)
    with pytest.raises(ConfigError, match="whose weights are not those of"):
        leanmill.attach(other, [{"type": "peft", "path": str(tmp_path)}])


def test_evaluation_has_the_plain_loss(folders):
    model, ids = llama(), Rows(1).ids[:2]
    expected = llama().eval()(input_ids=ids, labels=ids).loss
    leanmill.attach(model, [{"type": "distill", "teacher": str(folders / "teacher")}])
    assert torch.equal(model.eval()(input_ids=ids, labels=ids).loss, expected)


def test_the_folded_model_is_plain_and_the_attached_one_trains_on(folders, tmp_path):
    model = llama(tie_word_embeddings=True)
    attached = leanmill.attach(model, [{"type": "nm_sparsity"}, {"type": "lora", "rank": 2}], seed=1)
    trained_here(model, attached, 2)
    before = copy.deepcopy(dict(model.named_parameters()))
    plain, ids = leanmill.fold(model), torch.arange(LENGTH)[None]
    assert next(iter_sites(plain), None) is None
    assert type(plain) is type(llama())
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    kept = (plain.model.layers[0].mlp.up_proj.weight.unflatten(-1, (-1, 4)) != 0).sum(-1)
    assert kept.max() <= 2
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    report = export(model, tmp_path / "out")
    assert report.max_difference <= report.tolerance
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_rounded_activations_are_left_out_only_if_asked():
    model = llama()
    leanmill.attach(model, [{"type": "quest"}])
    with pytest.raises(ConfigError, match=r"quest round the input .* activations='float'"):
        leanmill.fold(model)
    assert next(iter_sites(leanmill.fold(model, activations="float")), None) is None


@pytest.mark.parametrize(
    ("techniques", "said"),
    [
        ([{"type": "dpo"}], r"dpo compares answers.*leanmill train"),
        ([{"type": "lisa"}], r"lisa trains other parameters in some steps.*leanmill train"),
        ([{"type": "rho1", "reference": "TEACHER"}], r"rho1 .*scores a step's batches.*leanmill train"),
        ([{"type": "rigl"}], r"rigl has steps without an optimizer step.*leanmill train"),
        ([{"type": "ternary"}, {"type": "quest"}], r"QUANT slot is taken by"),
        ([{"type": "nm_sparsty"}], r"did you mean nm_sparsity"),
        ([{"type": "nm_sparsity", "targets": ["query"]}], r"query"),
    ],
    ids=lambda value: value[0]["type"] if isinstance(value, list) else "",
)
def test_what_cannot_be_carried_is_refused_and_the_model_left_alone(folders, techniques, said):
    given = [{k: str(folders / "teacher") if v == "TEACHER" else v for k, v in one.items()} for one in techniques]
    model = llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=said):
        leanmill.attach(model, given)
    assert [name for name, _ in model.named_modules()] == names
    assert not any(parameter.is_meta or not parameter.requires_grad for parameter in model.parameters())


def test_models_that_cannot_be_attached_to_are_refused():
    with pytest.raises(ConfigError, match="trains in bfloat16.*dtype=torch.float32"):
        leanmill.attach(llama().bfloat16(), [{"type": "ternary"}])
    leanmill.attach(llama().bfloat16(), [{"type": "lora"}])  # the base is frozen
    model = llama()
    attached = leanmill.attach(model, [{"type": "ternary"}])
    assert attached_to(torch.nn.DataParallel(model)) is attached
    with pytest.raises(ConfigError, match="attached already"):
        leanmill.attach(model, [{"type": "nm_sparsity"}])
    with pytest.raises(ConfigError, match="nothing is attached to this LlamaForCausalLM"):
        leanmill.fold(llama())
    with pytest.raises(ConfigError, match="causal LM of transformers, got Linear"):
        leanmill.attach(torch.nn.Linear(2, 2), [])
    with pytest.raises(ConfigError, match="no step has begun"):
        attached.before_optimizer()


SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")


def test_models_that_predict_no_next_token_are_refused():
    from transformers import LlamaForSequenceClassification, ModernBertConfig, ModernBertForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for model in (
        ModernBertForMaskedLM(ModernBertConfig(vocab_size=64, **sizes, **dict.fromkeys(SPECIAL, 0))),
        LlamaForSequenceClassification(llama().config),
    ):
        with pytest.raises(ConfigError, match=f"{type(model).__name__} predicts none.*model.task: masked_lm"):
            leanmill.attach(model, [{"type": "ternary"}])


def test_rows_padded_on_the_left_are_refused_where_a_teacher_reads_them(folders):
    model, ids = llama().train(), Rows(1).ids[:2]
    leanmill.attach(model, [{"type": "distill", "teacher": str(folders / "teacher")}]).begin_step(0, num_steps=1)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pytest.raises(ConfigError, match="padding_side='right'"):
        model(input_ids=ids, labels=ids, attention_mask=mask)
    model(input_ids=ids, labels=ids, attention_mask=mask.flip(1)).loss.backward()
