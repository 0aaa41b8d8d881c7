"""Distillation against its formulas, chunked as the trainer does, and its errors."""

import pytest
import torch
from pydantic import ValidationError

from leanmill.core.errors import ConfigError
from leanmill.distill.logits.config import Distill
from leanmill.distill.logits.divergence import divergence
from tests.core.tiny import VOCAB_SIZE, context, term_of, tiny, tokens


KINDS = ["forward_kl", "reverse_kl", "js", "skew_forward_kl", "skew_reverse_kl", "total_variation", "mse", "cakld"]
KINDS += ["deviation_aware"]


def by_hand(student, teacher, kind, temperature, beta):
    """Each paper's own equation: GKD eq. 1; DistiLLM eq. 2 and 6; BitDistiller eq. 7; sums and means spelled out."""
    if kind == "mse":
        return (student.double() - teacher.double()).square().sum(-1) / student.shape[-1]
    p, q = (torch.softmax(z.double() / temperature, -1) for z in (teacher, student))
    of_both, flipped = beta * p + (1 - beta) * q, (1 - beta) * p + beta * q
    losses = {
        "forward_kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "js": beta * p * (p / of_both).log() + (1 - beta) * q * (q / of_both).log(),
        "skew_forward_kl": p * (p / of_both).log(),
        "skew_reverse_kl": q * (q / flipped).log(),
        "total_variation": (p - q).abs() / 2,
        "cakld": beta * q * (q / p).log() + (1 - beta) * p * (p / q).log(),
        "deviation_aware": (-(p * q.log()).sum(-1, True)).detach() ** beta * p * (p / q).log(),
    }
    return temperature**2 * losses[kind].sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_value_and_gradient(kind, temperature):
    student = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    twin = student.detach().clone().requires_grad_()
    teacher = torch.randn(7, 11, dtype=torch.float64)
    got = divergence(student, teacher, kind=kind, temperature=temperature, beta=0.3)
    expected = by_hand(twin, teacher, kind, temperature, 0.3)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(student.grad, twin.grad)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mse"])
def test_low_precision_logits_are_compared_in_fp32(kind):
    student, teacher = (torch.randn(5, 300) * 20).bfloat16(), (torch.randn(5, 300) * 20).bfloat16()
    got = divergence(student, teacher, kind=kind)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), divergence(student.double(), teacher.double(), kind=kind), rtol=1e-4, atol=1e-5
    )
    assert torch.isfinite(divergence(student.float() * 1000, teacher.float() * 1000, kind=kind)).all()


def batch_of(ids):
    labels = ids.roll(-1, 1).clone()
    labels[:, -1] = -100
    labels[0, :4] = -100
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_in_the_head_values_and_gradients_are_those_of_whole_logits(kind, top_k, dtype):
    if kind == "mse" and top_k:
        return
    torch.manual_seed(0)
    student = [torch.randn(n, 16).to(dtype).requires_grad_() for n in (37, VOCAB_SIZE)]
    teacher = tiny(seed=9, hidden_size=24).to(dtype)
    hidden, labels = torch.randn(37, 24).to(dtype), torch.randint(VOCAB_SIZE, (37,))
    labels[::5] = -100
    config = Distill(
        teacher="t", divergence=kind, skew=0.2, confidence=0.3, temperature=1.5, weight=0.4, top_k=top_k, focus=1.3
    )
    term = term_of(config, context(teacher))
    total, cross_entropy, divergence_ = term.with_cross_entropy(
        (*student, None), labels, {"teacher_hidden": hidden}, cross_entropy_weight=0.6, chunk_tokens=8
    )
    exact = [tensor.detach().double().requires_grad_() for tensor in student]
    logits = exact[0] @ exact[1].T
    of_teacher = (hidden @ teacher.lm_head.weight.T).double()
    if top_k:
        largest = of_teacher.topk(top_k).indices
        is_taken = torch.zeros(of_teacher.shape, dtype=torch.bool).scatter(-1, largest, True)

        def buckets(z):
            logs = (z / 1.5).log_softmax(-1)
            return 1.5 * torch.cat([logs.gather(-1, largest), logs.masked_fill(is_taken, -1e9).logsumexp(-1, True)], -1)

        whole = by_hand(buckets(logits), buckets(of_teacher), kind, 1.5, config._beta())
    else:
        whole = by_hand(logits, of_teacher, kind, 1.5, config._beta())
    expected = whole[labels != -100].sum()
    of_labels = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(divergence_.double(), expected, **close)
    torch.testing.assert_close(total.double(), 0.4 * expected + 0.6 * of_labels, **close)
    total.backward()
    (0.4 * expected + 0.6 * of_labels).backward()
    for ours, theirs in zip(student, exact, strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=close["rtol"], atol=close["rtol"] * scale)


@pytest.mark.parametrize("chunk", [1000, 5])
def test_the_term_is_the_divergence_of_whole_logits_over_tokens_with_a_label(chunk):
    student, teacher = tiny(), tiny(seed=9, hidden_size=24)
    batch = batch_of(tokens())
    term = term_of(Distill(teacher="t", divergence="js", temperature=2.0, weight=0.3), context(teacher))
    assert (term.name, term.weight) == ("distill", 0.3)
    extras = {name: value.flatten(0, 1) for name, value in term.prepare(batch).items()}
    assert all(not value.requires_grad and value.shape[-1] == 24 for value in extras.values())
    logits = student(batch["input_ids"]).logits.flatten(0, 1)
    labels = batch["labels"].flatten()
    got = sum(
        term(logits[i : i + chunk], labels[i : i + chunk], {n: v[i : i + chunk] for n, v in extras.items()})
        for i in range(0, len(labels), chunk)
    )
    whole = by_hand(logits, teacher(batch["input_ids"]).logits.flatten(0, 1), "js", 2.0, 0.5)
    torch.testing.assert_close(got.double(), whole[labels != -100].sum(), rtol=1e-4, atol=1e-5)
    got.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teachers_head_never_sees_the_whole_micro_batch():
    teacher, seen = tiny(seed=9), []
    teacher.get_output_embeddings().register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:-1].numel()))
    term = term_of(Distill(teacher="t"), context(teacher))
    extras = term.prepare(batch_of(tokens(2, 13)))
    assert seen == [2]
    term(
        torch.randn(3, VOCAB_SIZE),
        torch.zeros(3, dtype=torch.long),
        {"teacher_hidden": extras["teacher_hidden"][0, :3]},
    )
    assert seen == [2, 3]
    assert not teacher.base_model._forward_hooks


def test_tokens_without_a_label_pass_no_gradient():
    teacher = tiny(seed=9)
    term = term_of(Distill(teacher="t"), context(teacher))
    hidden = torch.randn(3, 32)
    logits = torch.randn(3, VOCAB_SIZE, requires_grad=True)
    value = term(logits, torch.tensor([4, -100, 5]), {"teacher_hidden": hidden})
    value.backward()
    assert (logits.grad[1] == 0).all()
    assert (logits.grad[[0, 2]] != 0).any()


def test_the_teacher_is_loaded_once_and_not_at_installation():
    loads = []

    def load(path):
        loads.append(path)
        return tiny(seed=9).eval().requires_grad_(False)

    installation = Distill(teacher="some/folder").install(None, context(load_frozen_model=load))
    assert loads == []
    for _ in range(2):
        installation.loss_terms[0].prepare(batch_of(tokens()))
    assert loads == ["some/folder"]


def test_documents_do_not_attend_to_each_other_in_the_teacher():
    teacher = tiny(seed=9)
    term = term_of(Distill(teacher="t"), context(teacher))
    ids = tokens(1, 12)
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(12).remainder(6)[None]}
    alone = {"input_ids": ids[:, 6:], "labels": ids[:, 6:], "position_ids": torch.arange(6)[None]}
    got = term.prepare(packed)["teacher_hidden"][:, 6:]
    torch.testing.assert_close(got, term.prepare(alone)["teacher_hidden"], rtol=1e-4, atol=1e-5)


def test_padding_rows_are_cut_when_the_tokenizers_agree():
    teacher = tiny(seed=9, vocab_size=VOCAB_SIZE + 3)
    term = term_of(Distill(teacher="t"), context(teacher, other_tokens=lambda path: ""))
    batch = batch_of(tokens())
    hidden = term.prepare(batch)["teacher_hidden"].flatten(0, 1)
    logits = torch.randn(len(hidden), VOCAB_SIZE)
    got = term(logits, batch["labels"].flatten(), {"teacher_hidden": hidden})
    whole = by_hand(logits, teacher.lm_head(hidden)[:, :VOCAB_SIZE], "forward_kl", 1.0, 0.5)
    torch.testing.assert_close(got.double(), whole[batch["labels"].flatten() != -100].sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"other_tokens": lambda path: None}])
def test_other_vocabularies_are_refused_with_both_sizes(changes):
    term = term_of(Distill(teacher="big/one"), context(tiny(vocab_size=70), **changes))
    with pytest.raises(ConfigError, match=rf"big/one.* 70 .*{VOCAB_SIZE}.*data\.tokenizer\.path") as error:
        term.prepare(batch_of(tokens()))
    assert "\n" not in str(error.value)


def test_other_tokens_under_the_same_numbers_are_refused_though_sizes_agree():
    changes = {"other_tokens": lambda path: f"number 7 is 'a' in its tokenizer and 'b' in that of {path}"}
    term = term_of(Distill(teacher="big/one"), context(tiny(), **changes))
    with pytest.raises(ConfigError, match=r"big/one has other tokens .*number 7 .*data\.tokenizer\.path: big/one"):
        term.prepare(batch_of(tokens()))


def test_a_teacher_that_caps_its_logits_is_refused():
    teacher = tiny()
    teacher.config.final_logit_softcapping = 30.0
    with pytest.raises(ConfigError, match="final_logit_softcapping"):
        term_of(Distill(teacher="t"), context(teacher)).prepare(batch_of(tokens()))


def test_more_largest_probabilities_than_tokens_are_refused():
    with pytest.raises(ConfigError, match=rf"top_k 62 is more than the {VOCAB_SIZE}"):
        term_of(Distill(teacher="t", top_k=62), context(tiny())).prepare(batch_of(tokens()))
    with pytest.raises(ValidationError, match=r"top_k 5 .*mse.*forward_kl"):
        Distill(teacher="t", divergence="mse", top_k=5)
