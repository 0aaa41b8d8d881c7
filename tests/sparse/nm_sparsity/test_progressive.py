"""Progressive Gradient Flow in real runs: the paper's update, resumed in the middle, exported; and what is refused."""

import shutil

import pydantic
import pytest
import torch
from safetensors.torch import load_file

from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.sites import Sites, iter_sites
from leanmill.export.run import export_model
from leanmill.kernels.nm_mask import naive
from leanmill.sparse.nm_sparsity import config
from leanmill.sparse.nm_sparsity.config import NMSparsity
from leanmill.trainer.run import run
from tests.core.tiny import context, install, tiny
from tests.sparse.nm_sparsity.test_once_a_step import LR, step
from tests.sparse.tiny_runs import recipe, steps_of, with_text


PROGRESSIVE = {"type": "nm_sparsity", "num_kept": 1, "group_size": 4, "progressive": {"decay": "linear"}}
LAST = "checkpoints/step-00000008"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_text(tmp_path_factory.mktemp("progressive"))


@pytest.mark.parametrize(
    "use", [{}, {"num_micro_batches": 2, "chunk_tokens": 7, "reuses_block": True, "recomputes": True}]
)
@pytest.mark.parametrize("gradient", ["masked", "straight_through", "sr_ste"])
def test_the_update_is_the_papers(gradient, use):
    """In the third of four steps the mask is at 1 - 2/3."""
    technique = PROGRESSIVE | {
        "gradient": gradient,
        "decay": 0.1,
        "progressive": {"decay": "linear", "fine_tune_share": 0.0},
    }
    before = step(technique, num_steps=2, run_steps=4, **use)
    start = {name: site.raw_weight.detach().clone() for name, site in iter_sites(before)}
    after = dict(iter_sites(step(technique, num_steps=3, run_steps=4, **use)))
    gradients = gradient_of_staged(before, left=1 / 3, **use)
    for name, weight in start.items():
        kept = naive.nm_mask_by_sort(weight, 1, 4)
        expected = gradients[name] * torch.where(kept, 1.0, 1 / 3 if gradient == "masked" else 1.0)
        if gradient == "sr_ste":
            expected = expected + 0.1 * weight * ~kept
        torch.testing.assert_close(after[name].raw_weight, weight - LR * expected, rtol=1e-5, atol=1e-8)


def gradient_of_staged(model, *, left, **use):
    """The gradient of the soft weights in the third step, by training a plain model that has them."""
    soft = {
        name: torch.where(naive.nm_mask_by_sort(w, 1, 4), w, left * w)
        for name, w in ((name, site.raw_weight.detach()) for name, site in iter_sites(model))
    }
    for name, site in iter_sites(model):
        site.raw_weight.data.copy_(soft[name])
    plain = step(start=model, first_step=2, **use)
    trained = {clean_name(name): parameter.detach() for name, parameter in plain.named_parameters()}
    return {name: (weight - trained[f"{name}.weight"]) / LR for name, weight in soft.items()}


@pytest.mark.parametrize("decay", ["exponential", pytest.param("stepwise", marks=pytest.mark.slow)])
def test_resumes_bitwise_inside_a_stage(folder, decay):
    technique = PROGRESSIVE | {"progressive": {"decay": decay, "dense_share": 0.1, "fine_tune_share": 0.2}}
    run(recipe(folder, f"{decay}-whole", technique))
    expected = {part: read_full_state(folder / f"{decay}-whole" / LAST, part) for part in ("model", "optimizer")}
    told = {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / f"{decay}-whole")}
    assert told[1][1]["nm_sparsity/left"] == 1
    assert told[8][1] == {"nm_sparsity/num_kept": 1, "nm_sparsity/group_size": 4, "nm_sparsity/left": 0}
    assert len({tuple(sorted(metrics.items())) for _, metrics in told.values()}) > 3
    name = f"{decay}-again"
    shutil.copytree(folder / f"{decay}-whole", folder / name)
    for later in range(5, 9):
        shutil.rmtree(folder / name / f"checkpoints/step-{later:08d}")
    assert run(recipe(folder, name, technique)).step == 8
    for part, state in expected.items():
        got = read_full_state(folder / name / LAST, part)
        assert got.keys() == state.keys()
        assert all(torch.equal(got[key], value) for key, value in state.items()), part
    again = {record["step"]: (record["losses"], record["metrics"]) for record in steps_of(folder / name)}
    assert again == told


def test_exports_what_the_last_step_multiplied_with(folder):
    technique = PROGRESSIVE | {"progressive": {"decay": "linear", "fine_tune_share": 0.2}}
    run(recipe(folder, "exported", technique))
    for at, is_soft in (("checkpoints/step-00000004", True), (LAST, False)):
        plain = folder / f"plain-{is_soft}"
        export_model(folder / "exported" / at, plain)
        weights, trained = load_file(plain / "model.safetensors"), read_full_state(folder / "exported" / at)
        raw = trained["model.layers.0.mlp.up_proj.weight"]
        left = 1 - 3 / 6.4 if is_soft else 0.0
        expected = torch.where(naive.nm_mask_by_sort(raw, 1, 4), raw, left * raw)
        torch.testing.assert_close(weights["model.layers.0.mlp.up_proj.weight"], expected, rtol=1e-6, atol=0)


def test_a_run_that_is_over_is_evaluated_under_its_last_mask():
    model = tiny()
    (rule,) = install(model, PROGRESSIVE).step_rules
    stages = [site.stages["mask"] for _, site in iter_sites(model)]
    assert {stage.pattern() for stage in stages} == {None}, "a run begins dense"
    rule.load_state_dict({"masking": [1, 4, 0.0]})
    assert {stage.pattern() for stage in stages} == {(1, 4)}
    assert rule.state_dict() == {"masking": [1, 4, 0.0]}
    assert all(stage.packing(torch.Size([8, 8])) is None for stage in stages)


def test_the_gradient_follows_the_mask_unless_told():
    assert NMSparsity().gradient == "sr_ste"
    assert NMSparsity(progressive={}).gradient == "masked"
    assert NMSparsity(progressive={}, gradient="sr_ste").gradient == "sr_ste"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"progressive": {"dense_share": 0.5, "fine_tune_share": 0.5}}, "leave nothing of the run in between"),
        ({"progressive": {"decay": "stepwise", "rate": 2.0}}, "rate belongs to decay: linear and exponential"),
        ({"progressive": {"num_stages": 3}}, "num_stages belongs to decay: geometric"),
        (
            {"group_size": 64, "progressive": {"decay": "geometric"}},
            "groups of 512, and 256 are allowed; set num_stages: 3",
        ),
        ({"transposable": True, "group_size": 8}, "keeps 2 of 4, not 2 of 8"),
        ({"transposable": True, "progressive": {"decay": "stepwise"}}, "goes through others; set decay: exponential"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        NMSparsity(**fields)


def test_groups_that_do_not_divide_a_layer_are_refused():
    geometric = NMSparsity(num_kept=1, group_size=8, progressive={"decay": "geometric"})
    with pytest.raises(ConfigError, match=r"q_proj: decay geometric begins with groups of 64.*num_stages to fewer"):
        geometric.install(Sites(tiny()), context())
    with pytest.raises(ConfigError, match=r"gate_proj: group_size 4 does not divide both dims.*\[46, 32\]"):
        NMSparsity(transposable=True).install(Sites(tiny(intermediate_size=46)), context())


def test_the_largest_group_is_the_kernels():
    assert config.LARGEST_GROUP == naive.LARGEST_GROUP


def test_a_rule_without_a_schedule_takes_no_mask_of_a_checkpoint():
    model = tiny()
    (rule,) = install(model, {"type": "nm_sparsity"}).step_rules
    rule.load_state_dict({"masking": [7, 8, 0.5]})
    assert {site.stages["mask"].pattern() for _, site in iter_sites(model)} == {(2, 4)}
    assert rule.state_dict() == {}
