"""Techniques together: any subset, any order, invariants of all, and off is off."""

import itertools

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.core.registry import TECHNIQUES, parse_technique, technique_class
from leanmill.core.sites import Sites, iter_sites
from leanmill.core.technique import Technique
from leanmill.quant.ternary.stage import Int8Activations
from tests.core.tiny import install, loss_of, tiny, tokens


RECIPES = {
    "nm_sparsity": {"type": "nm_sparsity", "decay": 0.1},
    "ternary": {"type": "ternary"},
    "lora": {"type": "lora", "rank": 2},
    "branch": {"type": "lora", "rank": 2, "where": "branch", "exclude": []},
    "distill": {"type": "distill", "teacher": "t"},
}
PAIRS = [
    pair
    for pair in itertools.combinations_with_replacement(RECIPES, 2)
    if pair[0] == pair[1] or RECIPES[pair[0]]["type"] != RECIPES[pair[1]]["type"]
]


def trained(names, family="llama", num_steps=2):
    """A few steps of SGD with every loss term, on a model with these techniques."""
    model = tiny(family)
    raw = []
    for name in dict.fromkeys(names):
        recipe = dict(RECIPES[name])
        if name == "branch" and family == "qwen3_moe":
            recipe["exclude"] = ["experts.*"]
        raw.append(recipe)
    torch.manual_seed(2)
    installed = install(model, *raw, teacher=tiny(seed=9))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(num_steps):
        ids = tokens(seed=step)
        logits = model(ids).logits
        labels = ids.roll(-1, 1)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        for term in installed.loss_terms:
            extras = term.prepare({"input_ids": ids, "labels": labels, "position_ids": positions})
            flat = {name: value.flatten(0, 1) for name, value in extras.items()}
            loss = loss + term.weight * term(logits.flatten(0, 1), labels.flatten(), flat) / labels.numel()
        loss.backward()
        assert torch.isfinite(loss)
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_pairs_train_and_keep_their_promises(names, family):
    model, start = trained(names, family), trained(names, family, num_steps=0)
    before = dict(start.named_parameters())
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    for name, site in iter_sites(model):
        weight = site.effective_weight().detach()
        if "nm_sparsity" in names:
            count = weight.reshape(-1, 4).count_nonzero(dim=-1)
            assert (count <= 2).all(), name
            assert "ternary" in names or (count == 2).all(), name
        if "ternary" in names:
            for matrix in weight.reshape(-1, *weight.shape[-2:]):
                levels = matrix.unique()
                assert levels.numel() <= 3, name
                assert torch.equal(levels, -levels.flip(0)), name


def test_the_order_of_listing_changes_nothing():
    raw = [RECIPES[name] for name in ("nm_sparsity", "ternary", "lora", "distill")]
    ids, expected = tokens(), None
    for order in (raw, raw[::-1], raw[2:] + raw[:2], [raw[1], raw[3], raw[0], raw[2]]):
        model = tiny()
        torch.manual_seed(3)
        install(model, *order, teacher=tiny())
        loss = loss_of(model, ids)
        loss.backward()
        got = [loss, *(p if p.grad is None else p.grad for p in model.parameters())]
        names = [name for name, _ in model.named_parameters()]
        expected = expected or (names, got)
        assert names == expected[0]
        assert all(torch.equal(a, b) for a, b in zip(got, expected[1], strict=True))


def test_off_is_bitwise_the_base():
    plain, model, ids = tiny(), tiny(), tokens()
    install(model, RECIPES["nm_sparsity"], RECIPES["ternary"])
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    fresh = tiny(seed=4)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_registered_technique_fulfils_the_protocol(name):
    needed = [key for key, field in technique_class(name).model_fields.items() if field.is_required()]
    # Or a cache of what one said; or no weight of the term that reads it.
    needed += {"distill": ["teacher"], "ba_lora": ["reference"]}.get(name, [])
    config = parse_technique({"type": name, **dict.fromkeys(needed, "some/model")})
    assert isinstance(config, Technique)
    assert type(config) is technique_class(name)
    assert config.type == name
    assert parse_technique(config) is config
    assert type(config).model_validate_json(config.model_dump_json()) == config
    documented = type(config).model_json_schema()["properties"]
    assert all("description" in field for field in documented.values()), documented


def test_an_unknown_technique_names_what_is_near():
    with pytest.raises(ConfigError, match=r"'ternay'.*did you mean ternary"):
        parse_technique({"type": "ternay"})
    with pytest.raises(ConfigError, match="mapping with a `type`"):
        parse_technique("ternary")


def test_reading_a_configuration_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; from leanmill.core.registry import TECHNIQUES, technique_class; "
        "[technique_class(name) for name in TECHNIQUES]; "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


_ROUNDED = {"type": "ternary", "activation_bits": 8}
_ONE_TOO_MANY = {
    "two masks": ([{"type": "nm_sparsity"}, {"type": "bdwp"}], "the MASK slot is taken by 'bdwp', so 'nm_sparsity'"),
    "two quantisers": ([{"type": "ternary"}, {"type": "quest"}], "the QUANT slot is taken by 'quest', so 'ternary'"),
    "one of two, twice": (
        [{"type": "lsq", "targets": ["q_proj"]}, {"type": "lsq", "targets": ["*_proj"]}],
        "q_proj: the QUANT slot is taken by 'lsq', so 'lsq'",
    ),
    "two branches": ([RECIPES["branch"], RECIPES["branch"]], "keep one lora with where: branch"),
    "activations of a table": (
        [{**_ROUNDED, "targets": ["embed_tokens"]}],
        "add 'model.embed_tokens' to ternary.exclude",
    ),
}


@pytest.mark.parametrize("case", _ONE_TOO_MANY)
def test_what_does_not_fit_is_refused_in_one_line(case):
    techniques, message = _ONE_TOO_MANY[case]
    with pytest.raises(ConfigError) as caught:
        install(tiny(), *techniques)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_slot_of_the_activations_has_one_tenant():
    site = Sites(tiny()).select(["q_proj"])[0]
    site.put_input(Int8Activations())
    with pytest.raises(ConfigError, match="the QUANT slot of the activations is taken by 'ternary', so 'ternary'"):
        site.put_input(Int8Activations())
