"""Choosing weights: kinds, patterns, ties, names, the report."""

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.names import clean_name
from leanmill.core.site import EmbeddingSite, ExpertSite, LinearSite
from leanmill.core.sites import Sites, iter_sites, matches
from tests.core.tiny import FAMILIES, WITH_EXPERTS, install, loss_of, tiny, tokens


STAGED = [family for family in FAMILIES if family != "gpt_oss"]


@pytest.mark.parametrize("family", STAGED)
def test_default_targets_are_linear_and_expert_weights(family):
    model = tiny(family)
    sites = Sites(model)
    kinds = {name: candidate.kind for name, candidate in sites.candidates.items()}
    assert kinds["lm_head"] == "head"
    assert kinds["model.embed_tokens"] == "embedding"
    selected = sites.select()
    names = {site.site_name for site in selected}
    assert names == {name for name, kind in kinds.items() if kind in ("linear", "expert")}
    assert {type(site) for site in selected} == ({LinearSite, ExpertSite} if family in WITH_EXPERTS else {LinearSite})
    for site in selected:
        assert site.raw_weight.dim() == (3 if isinstance(site, ExpertSite) else 2)
    assert [id(site) for site in sites.select()] == [id(site) for site in selected], "converting twice changes nothing"


def test_experts_of_another_layout_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"experts\.gate_up_proj: experts with transposed weights.* `exclude`"):
        Sites(tiny("gpt_oss")).select()


@pytest.mark.parametrize("family", STAGED)
def test_conversion_changes_neither_keys_nor_outputs(family):
    plain, model, ids = tiny(family), tiny(family), tokens()
    Sites(model).select(["*"])
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    tolerance = 1e-6 if family in WITH_EXPERTS else 0
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=tolerance, atol=tolerance)
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", 2),
        ("mlp.*_proj", 6),
        ("model.layers.0.*", 7),
        ("*", 16),
        ("lm_head", 1),
        ("layers.1.self_attn.[qk]_proj", 2),
    ],
)
def test_patterns(pattern, expected):
    assert len(Sites(tiny()).select([pattern])) == expected


def test_embeddings_and_head_only_when_named():
    model = tiny()
    (site,) = Sites(model).select(["embed_tokens"])
    assert isinstance(site, EmbeddingSite)
    assert model.get_input_embeddings() is site


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        (["q_porj"], [], r"targets pattern 'q_porj' matches no weight.*near names:.*q_proj"),
        (["model.layers.7.mlp.up_proj"], [], r"near names: .*up_proj"),
        (None, ["gate"], r"exclude pattern 'gate'.*gate_proj"),
        (["q_proj"], ["self_attn.*"], r"leave no weight"),
    ],
)
def test_patterns_that_match_nothing_name_what_is_near(targets, exclude, message):
    with pytest.raises(ConfigError, match=message) as error:
        Sites(tiny()).select(targets, exclude)
    assert "\n" not in str(error.value)


def test_tied_weights_come_together_or_not_at_all():
    model = tiny(tie_word_embeddings=True)
    sites = Sites(model)
    for one in ("embed_tokens", "lm_head"):
        with pytest.raises(ConfigError, match=r"tied.*both or neither"):
            sites.select([one])
    both = sites.select(["embed_tokens", "lm_head"])
    assert both[0].raw_weight is both[1].raw_weight
    assert sites.tied_to(both[0]) == [both[1].site_name]
    assert sites.tied_to(sites.select(["q_proj"])[0]) == []
    install(model, {"type": "ternary", "targets": ["embed_tokens", "lm_head"]})
    assert torch.equal(both[0].effective_weight(), both[1].effective_weight())
    assert len(list(model.parameters())) == len(list(tiny(tie_word_embeddings=True).parameters()))


def test_tied_weights_share_a_stage():
    model = tiny(tie_word_embeddings=True)
    install(model, {"type": "lsq", "granularity": "row", "targets": ["embed_tokens", "lm_head", "q_proj"]})
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = table.stages["quant"]
    assert head.stages["quant"] is shared
    queries = [layer.self_attn.q_proj.stages["quant"] for layer in model.model.layers]
    assert queries[0] is not queries[1]
    scales = [name for name, _ in model.named_parameters() if name.endswith("quant.scale")]
    assert scales == ["model.embed_tokens.stages.quant.scale"] + [
        f"model.layers.{i}.self_attn.q_proj.stages.quant.scale" for i in range(2)
    ]
    loss_of(model, tokens()).backward()
    both = shared.scale.grad.clone()
    parts = []
    for other in (table, head):
        shared.scale.grad = None
        staged = other.effective_weight().detach()
        own = other.stages
        other.stages = torch.nn.ModuleDict()
        plain = other.weight
        other.weight = torch.nn.Parameter(staged)
        loss_of(model, tokens()).backward()
        parts.append(shared.scale.grad.clone())
        other.stages, other.weight = own, plain
    torch.testing.assert_close(both, sum(parts), rtol=1e-4, atol=1e-8)


def test_report_counts():
    model = tiny()
    install(model, {"type": "ternary", "targets": ["q_proj", "lm_head"]})
    report = Sites(model).report()
    assert "0 of 1 embedding, 1 of 1 head, 2 of 14 linear" in report
    assert "left plain: model.embed_tokens, model.layers.0.self_attn.k_proj" in report


def test_names_survive_wrappers():
    assert clean_name("model._orig_mod.layers.0._checkpoint_wrapped_module.mlp.up_proj") == "model.layers.0.mlp.up_proj"
    assert clean_name("q_proj.base_layer.weight") == "q_proj.weight"
    model = tiny()
    install(model, {"type": "ternary"})
    names = [name for name, _ in iter_sites(model)]
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(layer)
    assert [name for name, _ in iter_sites(model)] == names
    assert set(Sites(model).candidates) >= set(names)


def test_matching_is_by_whole_parts():
    assert matches("up_proj", "a.up_proj")
    assert not matches("proj", "a.up_proj")
    assert not matches("a", "a.up_proj")


def test_a_report_where_no_weight_is_converted():
    assert Sites(tiny("llama")).report() == "no weight is converted: what the techniques do stands beside the weights"


def test_a_model_without_linear_weights_is_refused():
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 1))
    with pytest.raises(ConfigError, match="this model family has no linear or expert weights"):
        Sites(model).select()
