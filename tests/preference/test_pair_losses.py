"""Losses over pairs against their formulas, answer by answer: values, gradients, and the paths of the trainer."""

import pytest
import torch
from torch.nn import functional as F

from leanmill.core.adapters import adapters_off
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.registry import parse_technique
from leanmill.core.rules import StepContext
from leanmill.core.sites import Sites
from leanmill.preference.answers import REFERENCE_LOSSES
from leanmill.trainer.scoring import TokenLosses
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import context, install, tiny
from tests.preference.pairs import conversations, log_probability, rows


BETA = 0.7
STEP = StepContext(step=0, num_steps=1, num_micro_batches=1)
CASES = {
    "sigmoid": {"type": "dpo"},
    "hinge": {"type": "dpo", "loss": "hinge"},
    "ipo": {"type": "dpo", "loss": "ipo"},
    "robust": {"type": "dpo", "loss": "robust", "label_smoothing": 0.2},
    "with the chosen": {"type": "dpo", "chosen_weight": 0.3},
    "kto": {"type": "kto", "chosen_weight": 1.3, "rejected_weight": 0.8},
}


def by_hand(case, model, reference, batch):
    """The mean loss over pairs as TRL 1.16 has it, each conversation in a forward of its own."""
    num_pieces = 3 if case["type"] == "kto" else 2
    pairs = conversations(batch, num_pieces)
    policy = torch.stack([torch.stack([log_probability(model, *one) for one in pair]) for pair in pairs])
    with torch.no_grad():
        of_reference = torch.stack([torch.stack([log_probability(reference, *one) for one in pair]) for pair in pairs])
    ratios = policy - of_reference
    lengths = torch.tensor([[(labels != -100).sum() for _, labels in pair] for pair in pairs])
    if case["type"] == "kto":
        zero = ratios[:, 2].mean().detach().clamp(min=0)
        chosen = case["chosen_weight"] * (1 - F.sigmoid(BETA * (ratios[:, 0] - zero)))
        rejected = case["rejected_weight"] * (1 - F.sigmoid(BETA * (zero - ratios[:, 1])))
        return torch.cat([chosen, rejected]).mean()
    delta = ratios[:, 0] - ratios[:, 1]
    kind, e = case.get("loss", "sigmoid"), case.get("label_smoothing", 0.0)
    averaged = ratios / lengths
    loss = {
        "sigmoid": lambda: -F.logsigmoid(BETA * delta),
        "hinge": lambda: torch.relu(1 - BETA * delta),
        "ipo": lambda: (averaged[:, 0] - averaged[:, 1] - 1 / (2 * BETA)) ** 2,
        "robust": lambda: (-(1 - e) * F.logsigmoid(BETA * delta) + e * F.logsigmoid(-BETA * delta)) / (1 - 2 * e),
    }[kind]()
    return loss.mean() - case.get("chosen_weight", 0.0) * policy[:, 0].sum() / lengths[:, 0].sum()


def trained(case, model, reference, batch, *, chunk_tokens="auto", others=(), micro_batches=1):
    """The objective of the trainer for a step, divided as the loop divides it; and what rules report."""
    raw = {**case, "beta": BETA, "reference": "it"}
    found = install(model, raw, *others, teacher=reference)
    module = TrainModule(model, found.loss_terms, 0.0, chunk_tokens).train()
    scores = {id(one): TokenLosses(one) for one in (model, reference)}
    rule = next(rule for rule in found.step_rules if rule.name == case["type"])
    parts = [{name: value[part] for name, value in batch.items()} for part in torch.arange(3).chunk(micro_batches)]
    parts = rule.change_batches(parts, STEP, lambda part, which, adapters=True: scores[id(which)](part))
    num_labels = (batch["labels"] != -100).sum()
    losses = [module(part) for part in parts]
    rule.after_optimizer(STEP)
    return sum(one["total"] for one in losses) / num_labels, losses, rule.metrics()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk_tokens", ["auto", 8])
def test_loss_and_gradients_are_those_of_the_formula(name, chunk_tokens):
    case, (model, twin), reference = CASES[name], (tiny(), tiny()), tiny(seed=5)
    batch = rows(3 if case["type"] == "kto" else 2)
    loss, losses, metrics = trained(case, model, reference, batch, chunk_tokens=chunk_tokens)
    expected = by_hand(case, twin, reference, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (which, got), right in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, right.grad, rtol=1e-4, atol=2e-6, msg=which)
    assert losses[0].keys() == {"cross_entropy", case["type"], "total"}
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["margin"] == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"], abs=1e-5)


def test_long_answers_lose_no_digits():
    """Of answers of a thousand nats, in fp32, as in fp64: what the model has moved is what is added up."""
    found = install(tiny(), {"type": "dpo", "reference": "it"}, teacher=tiny(seed=5))
    (rule,) = (rule for rule in found.step_rules if rule.name == "dpo")
    generator = torch.Generator().manual_seed(0)
    wanted = 9 + torch.randn(4, 200, dtype=torch.float64, generator=generator)
    moved = wanted + 1e-3 * torch.randn(4, 200, dtype=torch.float64, generator=generator)
    losses = {name: value.reshape(2, 400).float() for name, value in (("before", wanted), ("now", moved))}
    batch = {"position_ids": torch.arange(200).repeat(2, 2), "labels": torch.ones(2, 400, dtype=torch.int64)}
    batch["input_ids"] = batch["labels"]
    (batch,) = rule.change_batches([batch], STEP, lambda part, which: losses["before"])
    ratios = (losses["before"].double() - losses["now"].double()).view(2, 2, 200).sum(-1)
    expected = -F.logsigmoid(0.1 * (ratios[:, 0] - ratios[:, 1])).mean()
    got = rule.of_token_losses(losses["now"], batch) / batch["labels"].numel()
    assert abs(got.item() - expected.item()) < 2e-7


def test_terms_of_logits_beside_it():
    model, teacher, batch = tiny(), tiny(seed=5), rows(2)
    distill = {"type": "distill", "teacher": "it", "weight": 0.5}
    for chunk_tokens in ("auto", 8):
        loss, losses, _ = trained(CASES["sigmoid"], model, teacher, batch, others=[distill], chunk_tokens=chunk_tokens)
        assert losses[0].keys() == {"cross_entropy", "distill", "dpo", "total"}
        loss = loss - 0.5 * losses[0]["distill"] / (batch["labels"] != -100).sum()
        expected = by_hand(CASES["sigmoid"], model, teacher, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_a_family_that_caps_its_logits():
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = tiny().config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: plain[key] for key in (*kept, "num_key_value_heads")}
    config = AutoConfig.for_model("gemma2", **sizes, head_dim=16, final_logit_softcapping=3.0)
    model, batch = AutoModelForCausalLM.from_config(config, attn_implementation="eager"), rows(2)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    loss, _, _ = trained(CASES["sigmoid"], model, reference, batch)
    torch.testing.assert_close(loss, by_hand(CASES["sigmoid"], model, reference, batch), rtol=1e-5, atol=1e-5)


def test_micro_batches_make_up_the_step():
    case, reference, batch = CASES["with the chosen"], tiny(seed=5), rows(2)
    whole, _, metrics = trained(case, tiny(), reference, batch)
    parts, _, same = trained(case, tiny(), reference, batch, micro_batches=3)
    torch.testing.assert_close(parts, whole)
    assert same == pytest.approx(metrics)


def test_without_a_reference_the_model_without_adapters_is_it():
    for where in ("weight", "branch"):
        model, batch = tiny(), rows(2)
        lora = {"type": "lora", "rank": 2, "where": where}
        mask = {"type": "nm_sparsity"} if where == "weight" else {"type": "ternary"}
        found = install(model, {"type": "dpo"}, lora, mask)
        start = tiny()
        install(start, mask)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        with adapters_off(model):
            without = TokenLosses(model)(batch)
        assert torch.equal(without, TokenLosses(start)(batch))
        assert not torch.allclose(TokenLosses(model)(batch), without)
        assert {rule.name for rule in found.step_rules} >= {"dpo"}


def test_what_cannot_be_a_reference_is_refused():
    with pytest.raises(ConfigError, match=r"the model has no adapters; set dpo\.reference"):
        install(tiny(), {"type": "dpo"})
    with pytest.raises(ConfigError, match=r"trains beside adapters"):
        install(tiny(), {"type": "dpo"}, {"type": "lora", "rank": 2}, {"type": "lsq", "granularity": "row"})
    with pytest.raises(ValueError, match=r"set loss: robust"):
        install(tiny(), {"type": "dpo", "label_smoothing": 0.1, "reference": "it"})


def test_a_reference_with_another_vocabulary_is_refused():
    reference = tiny(seed=5)
    reference.config.vocab_size += 8
    found = install(tiny(), {"type": "dpo", "reference": "it"}, teacher=reference)
    with pytest.raises(ConfigError, match="reference it has a vocabulary of"):
        found.step_rules[0].change_batches([rows(2)], STEP, lambda *_, **__: pytest.fail("scored"))


def test_a_step_without_a_pair_is_refused():
    found = install(tiny(), {"type": "dpo", "reference": "it"}, teacher=tiny(seed=5))
    batch = rows(2)
    with pytest.raises(RunError, match="a step has no pair"):
        found.step_rules[0].change_batches([{**batch, "labels": torch.full_like(batch["labels"], -100)}], STEP, None)


def with_cache(folder, batch, score, *, kind="dpo", weights="w", **offered):
    """The rule's metrics and losses of the reference; `score` is asked for what is missing."""
    model = tiny()
    raw = {"type": kind, "reference": "it", "cache_dir": str(folder)}
    given = context(tiny(seed=5), data_fingerprint="d", fingerprint_of_model=lambda path: weights, **offered)
    rule = parse_technique(raw).install(Sites(model), given).step_rules[0]
    found = torch.cat([part[REFERENCE_LOSSES] for part in rule.change_batches(_halves(batch), STEP, score)])
    return found, rule.metrics()


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_what_the_reference_said_is_read(tmp_path, kind):
    batch, asked = rows(3 if kind == "kto" else 2), []

    def score(part, which):
        asked.append(part["row_ids"].tolist())
        return TokenLosses(which)(part)

    written, metrics = with_cache(tmp_path, batch, score, kind=kind)
    assert torch.equal(written, torch.cat([TokenLosses(tiny(seed=5))(part) for part in _halves(batch)]))
    assert (asked, metrics) == ([[0, 1], [2]], {"share_read": 0.0})
    again, metrics = with_cache(tmp_path, batch, lambda *_: pytest.fail("asked"), kind=kind)
    assert torch.equal(again, written)
    assert metrics == {"share_read": 1.0}
    (path,) = tmp_path.glob("rows-*.bin")
    path.write_bytes(path.read_bytes()[:-1])  # a kill in mid-write
    again, _ = with_cache(tmp_path, batch, score, kind=kind)
    assert torch.equal(again, written)
    assert asked[2:] == [[2]]


def _halves(batch):
    return [{name: value[part] for name, value in batch.items()} for part in torch.arange(3).chunk(2)]


def test_what_another_reference_said_is_refused(tmp_path):
    batch = rows(2)
    with_cache(tmp_path, batch, lambda part, which: torch.zeros(part["labels"].shape))
    with pytest.raises(ConfigError, match=r"dpo\.cache_dir .* weights of the reference w, and this run has v"):
        with_cache(tmp_path, batch, None, weights="v")
    with pytest.raises(ValueError, match=r"set dpo\.reference to the folder that training starts from"):
        parse_technique({"type": "dpo", "cache_dir": "c"})
