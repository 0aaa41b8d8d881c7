"""GaLore against the paper's update, written out over a model whose weights all train."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from leanmill.core.sites import iter_sites
from leanmill.parallel.launch import Ranks
from leanmill.peft_ext.galore.stage import GaLoreStage
from leanmill.recipe.root import Recipe
from tests.contract_training import FixedRows, full_parameters, train


ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
RANK, EVERY, SCALE, LR, BETAS, EPS, NUM_STEPS = 3, 2, 0.7, 1e-2, (0.9, 0.95), 1e-3, 5
MODEL = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip


class Rows(FixedRows):
    """As many rows as five steps take."""

    def __init__(self):
        super().__init__()
        self.ids, self.labels = self.ids.repeat(2, 1), self.labels.roll(1, 0).repeat(2, 1)


def recipe(**options):
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": MODEL},
            "data": {"sequence_length": 16},
            "techniques": [{"type": "galore", "rank": RANK, "every_steps": EVERY, "scale": SCALE, **options}],
            "engine": {"type": "single"},
            "optimizer": {"type": "adamw", "lr": LR, "eps": EPS, "betas": BETAS, "weight_decay": 0},
            "schedule": {"type": "constant", "warmup_steps": 0},
            "batch": {"tokens_per_step": 128, "tokens_per_micro_batch": 64},
            "train": {"steps": NUM_STEPS, "precision": "fp32", "max_grad_norm": None},
        }
    )


def trained(num_steps, **options):
    engine = train(recipe(**options), ONE, num_steps=num_steps, data=Rows())[0]
    weights = {f"{name}.weight": site.effective_weight().detach() for name, site in iter_sites(engine.module.model)}
    plain = {name: value for name, value in full_parameters(engine).items() if ".stages." not in name}
    return {**plain, **weights}


class Adam:
    """Of one tensor; returns the step, without the learning rate."""

    def __init__(self):
        self.first = self.second = self.count = 0

    def __call__(self, gradient):
        self.count += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient**2
        root = (self.second / (1 - BETAS[1] ** self.count)).sqrt()
        return self.first / (1 - BETAS[0] ** self.count) / (root + EPS)


class Projected:
    """The paper's algorithm 2 for one weight [m, n]."""

    def __init__(self, history=None, damping=0.0):
        self.adam, self.basis, self.step, self.past = Adam(), None, 0, []
        self.history, self.damping = history, damping

    def __call__(self, gradient):
        is_left = gradient.shape[0] <= gradient.shape[1]
        tall = gradient if is_left else gradient.T
        if self.step % EVERY == 0:
            new = torch.linalg.svd(tall, full_matrices=False)[0][:, :RANK]
            if self.basis is not None:  # moments go on, so signs matter
                new = new * torch.where((new * self.basis).sum(0) < 0, -1.0, 1.0)
            self.basis = new
        self.step += 1
        low = self.basis.T @ tall
        update = SCALE * self.basis @ self.adam(self.natural(low) if self.history else low)
        return update if is_left else update.T

    def natural(self, gradient):
        """(damping I + G G^T)^-1 g, by the matrix itself, times the damping."""
        self.past = [*self.past, gradient.flatten().double()][-self.history :]
        columns = torch.stack(self.past, 1)
        fisher = self.damping * torch.eye(len(columns), dtype=torch.float64) + columns @ columns.T
        return (self.damping * torch.linalg.solve(fisher, columns[:, -1])).float().view_as(gradient)


def by_hand(model, **of_projected):
    """Five steps in plain code; batches and their normalisation are those of the run."""
    rules = {
        name: Projected(**of_projected) if name.endswith("_proj.weight") else Adam()
        for name, _ in model.named_parameters()
    }
    rows = Rows()
    for _ in range(NUM_STEPS):
        batch = rows.next_rows(8, rank=0, world_size=1)
        labels = batch.pop("labels")
        logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        # Labels are those of the positions themselves.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= LR * rules[name](parameter.grad)
    return dict(model.named_parameters())


def plain_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODEL)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(trained(0))
    return model.train()


@pytest.mark.parametrize("natural", [None, {"history": 3, "damping": 1e-2}])
def test_weights_are_those_of_the_papers_update(natural):
    expected = by_hand(plain_model(), **(natural or {}))
    got = trained(NUM_STEPS, **({"natural": natural} if natural else {}))
    start = trained(0)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        assert moved > 0, name
        assert (got[name] - value).norm() <= 2e-3 * moved, name


@pytest.mark.parametrize("shape", [(7, 11), (11, 7), (2, 5, 9), (2, 9, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stage_adds_the_product_and_projects_the_gradient(shape, dtype):
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    stage = GaLoreStage(weight, 3)
    nn.init.normal_(stage.coordinates)
    outer = torch.randn(shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        staged = stage(weight)
        (staged * outer).sum().backward()
    is_left = shape[-2] <= shape[-1]
    basis, coordinates = stage.basis, stage.coordinates.detach()
    delta = basis @ coordinates if is_left else coordinates @ basis
    assert staged.dtype == dtype
    torch.testing.assert_close(staged, (weight.float() + delta).to(dtype))
    wide = outer.float()
    projected = basis.mT @ wide if is_left else wide @ basis.mT
    torch.testing.assert_close(stage.coordinates.grad, projected, rtol=1e-5, atol=1e-5)
    gram = basis.mT @ basis if is_left else basis @ basis.mT
    torch.testing.assert_close(gram, torch.eye(3).expand_as(gram), rtol=0, atol=1e-5)


def test_a_weight_that_trains_gets_its_whole_gradient_too():
    weight = torch.randn(5, 8, requires_grad=True)
    outer = torch.randn(5, 8)
    (GaLoreStage(weight, 2)(weight) * outer).sum().backward()
    torch.testing.assert_close(weight.grad, outer)
