"""Self-attention relations against MiniLMv2's equations: values and gradients, alone and in a model, and refusals."""

import math

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.registry import parse_technique
from leanmill.distill.relations.relation import documents_of, relation_divergence
from leanmill.models.activation_checkpointing import apply_activation_checkpointing
from leanmill.trainer.prepare import install_techniques
from leanmill.trainer.train_module import TrainModule
from tests.core.tiny import VOCAB_SIZE, context, tiny, tokens


def by_hand(student, teacher, positions, num_heads):
    """KL of each token's relations [B, S], fp64, a token and a head at a time: eq. 5 to 7 over the tokens up to it."""
    rows = []
    for s, t, p in zip(student.double(), teacher.double(), positions.tolist(), strict=True):
        of_row = []
        for i, position in enumerate(p):
            among, total = slice(i - position, i + 1), 0.0
            for head in range(num_heads):
                logs = []
                for x in (t, s):
                    d = x.shape[-1] // num_heads
                    a = x[:, head * d : (head + 1) * d]
                    logs.append((a[i] @ a[among].T / math.sqrt(d)).log_softmax(-1))
                total = total + (logs[0].exp() * (logs[0] - logs[1])).sum()
            of_row.append(total / num_heads)
        rows.append(torch.stack(of_row))
    return torch.stack(rows)


def positions_of(length):
    """Two rows, the first of three documents."""
    first = torch.cat([torch.arange(5), torch.arange(1), torch.arange(length - 6)])
    return torch.stack([first, torch.arange(length)])


@pytest.mark.parametrize(("num_heads", "widths"), [(1, (6, 10)), (4, (12, 20)), (3, (3, 33))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_gradient(dtype, num_heads, widths):
    torch.manual_seed(0)
    student, teacher = ((2 * torch.randn(2, 11, width)).to(dtype) for width in widths)
    student.requires_grad_()
    twin = student.detach().double().requires_grad_()
    documents = documents_of(positions_of(11))
    parts = [relation_divergence(student, teacher, documents, num_heads, *part) for part in ((0, 4), (4, 11))]
    got, expected = torch.cat(parts, 1), by_hand(twin, teacher, positions_of(11), num_heads)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    factors = torch.randn(2, 11)
    (got * factors).sum().backward()
    (expected * factors).sum().backward()
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    torch.testing.assert_close(student.grad.double(), twin.grad, **close)


def technique(**settings):
    return parse_technique({"type": "relation_distill", "teacher": "t", **settings})


def batch_of(length=13):
    ids = tokens(2, length)
    labels = ids.roll(-1, 1).clone()
    labels[:, -1] = -100
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels, "position_ids": positions_of(length), "row_ids": torch.arange(2)}


def trained(model, teacher, *raw):
    offered = context(teacher)
    installed = install_techniques([parse_technique(one) for one in raw], model, offered)
    return TrainModule(model, installed.loss_terms, 1.0, ledger=offered.ledger)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("relations", [["queries", "keys", "values"], ["values"]])
def test_in_a_model_equals_plain_autograd(relations, recompute):
    raw = {
        "type": "relation_distill",
        "teacher": "t",
        "weight": 0.3,
        "layers": [[0, 1], [1, 3]],
        "relations": relations,
    }
    teacher = tiny(seed=9, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    model, plain, batch = tiny(), tiny(), batch_of()
    module = trained(model, teacher, raw)
    apply_activation_checkpointing(model, recompute)
    module.train()
    num_valid = int((batch["labels"] != -100).sum())
    module.ledger.begin_step(token_scale=torch.tensor(1 / num_valid), num_micro_batches=1)
    (module(batch)["total"] / num_valid).backward()

    seen = {}

    def keep(owner, layers):
        for layer in layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                module = getattr(owner.model.layers[layer].self_attn, name)
                module.register_forward_hook(lambda m, a, out, key=(layer, name): seen.__setitem__(key, out))

    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    keep(teacher, (1, 3))
    with torch.no_grad():
        teacher(**inputs)
    theirs = dict(seen)
    seen.clear()
    keep(plain, (0, 1))
    logits = plain(**inputs).logits
    cross_entropy = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    names = {"queries": ("q_proj", 4), "keys": ("k_proj", 4), "values": ("v_proj", 4)}
    loss = 0.0
    for mine, its in ((0, 1), (1, 3)):
        for name, num_heads in (names[relation] for relation in relations):
            each = by_hand(seen[mine, name], theirs[its, name], batch["position_ids"], num_heads)
            loss = loss + each[batch["labels"] != -100].sum()
    ((cross_entropy + 0.3 / 2 * loss) / num_valid).backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5, msg=name)
    means = module.ledger.means(module.ledger.take(), torch.tensor(float(num_valid)))[0]
    told = sum(float(value) for name, value in means.items() if name.startswith("relation_distill/"))
    assert told == pytest.approx(float(loss.detach()) / num_valid, rel=1e-4)


def test_nothing_is_compared_in_eval():
    model, teacher = tiny(), tiny(seed=9)
    calls = []
    teacher.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    module = trained(model, teacher, {"type": "relation_distill", "teacher": "t"}).eval()
    module(batch_of())
    assert not calls


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"layers": [[2, 0]]}, "relation_distill.layers: the student has no layer 2"),
        ("llama", {"num_relation_heads": 5}, "does not divide projections of 32 entries.*set one of 1, 2, 4"),
        ("deepseek_v2", {}, "deepseek_v2 model has no attention with a [qk]_proj"),
    ],
)
def test_what_does_not_fit_is_refused(family, settings, message):
    with pytest.raises(ConfigError, match=message):
        install_techniques([technique(**settings)], tiny(family), context(tiny(seed=9)))


def test_another_vocabulary_and_a_branch_are_refused():
    with pytest.raises(ConfigError, match=f"70 .*{VOCAB_SIZE}"):
        install_techniques([technique()], tiny(), context(tiny(vocab_size=70)))
    branch = parse_technique({"type": "lora", "rank": 2, "where": "branch"})
    with pytest.raises(ConfigError, match="adds a branch beside it"):
        install_techniques([technique(), branch], tiny(), context(tiny(seed=9)))
