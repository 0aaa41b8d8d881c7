"""The largest loss in a box of logits, against a search; and through real evaluations."""

import pytest
import torch
import torch.distributed as dist
from scipy.optimize import minimize
from torch.nn import functional as F  # noqa: N812

from leanmill.core.errors import ConfigError
from leanmill.data.evaluation import EvalDomain
from leanmill.models.build import build_on_meta
from leanmill.parallel.build import build_engine
from leanmill.parallel.config import SingleEngine
from leanmill.parallel.launch import Ranks
from leanmill.quant.sharpness.probe import sharpness
from leanmill.trainer.evaluate_checkpoint import score_domains
from leanmill.trainer.evaluation import evaluate
from leanmill.trainer.prepare import prepare
from tests.contract_cases import ENGINES
from tests.contract_training import recipe_of
from tests.core.tiny import FAMILIES, install, tiny, tokens
from tests.distributed import run_ranks


@pytest.mark.parametrize("radius", [5e-4, 0.1])
def test_the_corner_is_what_a_search_finds(radius):
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(6, 9), torch.tensor([0, 8, 3, -100, 1, 5])
    got = sharpness(logits, labels, radius)
    assert got[3] == 0
    for row, label, value in zip(logits.double(), labels, got, strict=True):
        if label < 0:
            continue
        reach = radius * (row.abs() + 1)

        def negative(z, label=label):
            z = torch.tensor(z, requires_grad=True)
            loss = -F.cross_entropy(z, label)
            loss.backward()
            return loss.item(), z.grad.numpy()

        bounds = list(zip((row - reach).tolist(), (row + reach).tolist(), strict=True))
        found = minimize(negative, row.numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
        loss = F.cross_entropy(row, label).item()
        assert value.item() == pytest.approx(100 * (-found.fun - loss) / (1 + loss), rel=1e-3)


def domain(ids):
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    positions = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
    rows = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return EvalDomain(name="text", rows=rows, num_bytes=100, order0_bits_per_byte=8.0, num_rows_asked=2), labels


def make(family, monkeypatch):
    monkeypatch.setitem(FAMILIES, "gemma2", {"head_dim": 16, "final_logit_softcapping": 2.0})
    return tiny(family)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("chunk", [None, 5])
def test_an_evaluation_says_the_mean_over_tokens_and_changes_no_score(chunk, family, monkeypatch):
    model = make(family, monkeypatch)
    one, labels = domain(tokens())
    logits = model(one.rows["input_ids"]).logits.float().flatten(0, 1)
    expected = sharpness(logits, labels.flatten(), 0.01).sum() / (labels != -100).sum()
    probes = install(model, {"type": "sharpness", "radius": 0.01}).probes
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))

    def scored(probes):
        engine, _ = build_engine(SingleEngine(), ranks=ranks, precision="fp32", model_bytes=0)
        return score_domains(engine, model, [one], 3, probes, chunk or "auto")

    found = scored(probes)
    assert found.metrics["sharpness/logits"] == pytest.approx(expected.item(), rel=1e-4)
    assert found.tables["sharpness"] == {"text": pytest.approx(expected.item(), rel=1e-4)}
    assert found.scores == scored(()).scores
    assert scored(probes).metrics == found.metrics, "counts start anew"


def test_a_head_of_another_kind_is_refused_or_noted():
    odd = tiny()
    odd.config.logit_scale = 0.5
    with pytest.raises(ConfigError, match=r"changes its logits after the head \(logit_scale\)"):
        install(odd, {"type": "sharpness"})
    model = tiny()
    (probe,) = install(model, {"type": "sharpness"}).probes
    probe.begin({"labels": torch.zeros(2, 4, dtype=torch.int64)})
    model(tokens(), logits_to_keep=1)
    finding = probe.find({"text": probe.take()})
    assert not finding.metrics
    assert "could not be measured" in finding.notes[0]


def _on_two_ranks(engine_type):
    rank = dist.get_rank()
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    recipe = recipe_of(("sharpness", "ternary"), ENGINES[engine_type], "none", 2)
    engine, _ = build_engine(recipe.engine, ranks=ranks, precision="fp32", model_bytes=0, layout=recipe.layout)
    prepared = prepare(recipe, build_on_meta(recipe.model, vocab_size=None), engine, num_micro_batches=2)
    one, _ = domain(tokens(3, 8))
    found = evaluate(engine, [one], 1, prepared.techniques.probes)
    engine.close()
    return found.metrics, found.notes


@pytest.mark.slow
@pytest.mark.parametrize("engine_type", ENGINES)
def test_every_engine_says_what_one_process_says(engine_type):
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    recipe = recipe_of(("sharpness", "ternary"), {"type": "single"}, "none", 1)
    engine, _ = build_engine(recipe.engine, ranks=ranks, precision="fp32", model_bytes=0)
    prepared = prepare(recipe, build_on_meta(recipe.model, vocab_size=None), engine, num_micro_batches=2)
    one, _ = domain(tokens(3, 8))
    expected = evaluate(engine, [one], 1, prepared.techniques.probes).metrics
    metrics, notes = run_ranks(_on_two_ranks, 2, engine_type)[0]
    assert notes == ()
    assert metrics == {name: pytest.approx(value, rel=1e-4) for name, value in expected.items()}
    assert metrics["sharpness/logits"] > 0
