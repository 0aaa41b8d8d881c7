"""Layer sampling against the paper: gamma of the layers, uniform without replacement, anew every K steps."""

import itertools
from collections import Counter

import pytest
import torch

from leanmill.core.errors import ConfigError
from leanmill.peft_ext.lisa.schedule import LayerSampling
from leanmill.recipe.root import Recipe
from tests.contract_cases import ENGINES
from tests.contract_training import recipe_of
from tests.core.tiny import install, tiny


LAYERS = [f"model.layers.{n}" for n in range(12)]
NAMES = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"] + [
    f"{layer}.{name}" for layer in LAYERS for name in ("self_attn.q_proj.weight", "mlp.up_proj.stages.quant.scale")
]


def layers_of(names):
    return {name.split(".")[2] for name in names if ".layers." in name}


@pytest.mark.parametrize("every_steps", [1, 3, 20])
@pytest.mark.parametrize("num_layers", [1, 2, 5, 12])
def test_gamma_layers_train_for_k_steps_beside_what_lies_outside(num_layers, every_steps):
    schedule = LayerSampling(LAYERS, num_layers, every_steps, seed=3)
    sets = [schedule.trained(NAMES, step) for step in range(4 * every_steps)]
    for trained in sets:
        assert set(NAMES[:3]) <= trained
        assert len(layers_of(trained)) == num_layers
        assert len(trained) == 3 + 2 * num_layers  # layers rest and train whole
    for start in range(0, len(sets), every_steps):
        assert all(trained == sets[start] for trained in sets[start : start + every_steps])
    if num_layers < 12:
        assert len({frozenset(trained) for trained in sets}) > 1
    assert LayerSampling(LAYERS[::-1], num_layers, every_steps, seed=3).trained(NAMES[::-1], 2) == sets[2]


def test_draws_are_uniform_without_replacement_and_independent():
    num_draws, num_layers, total = 6000, 2, 6
    schedule = LayerSampling(LAYERS[:total], num_layers, 1, seed=0)
    draws = [tuple(sorted(schedule.drawn(LAYERS[:total], step))) for step in range(num_draws)]
    pairs = list(itertools.combinations(LAYERS[:total], num_layers))

    def chi_square(counts, cells):
        expected = sum(counts.values()) / cells
        return sum((counts[c] - expected) ** 2 for c in counts) / expected + (cells - len(counts)) * expected

    # 15 pairs of layers and 225 pairs of successive draws; 99.9 % quantiles of chi-square with 14 and 224 degrees.
    assert chi_square(Counter(draws), len(pairs)) < 36.1
    assert chi_square(Counter(zip(draws[::2], draws[1::2], strict=True)), len(pairs) ** 2) < 294
    other = LayerSampling(LAYERS[:total], num_layers, 1, seed=1)
    equal = sum(set(draws[step]) == other.drawn(LAYERS[:total], step) for step in range(num_draws))
    assert abs(equal / num_draws - 1 / len(pairs)) < 0.015


def test_layers_without_trainable_parameters_take_no_part():
    names = [name for name in NAMES if ".layers.1." in name or ".layers.4." in name]
    schedule = LayerSampling(LAYERS, 1, 1, seed=0)
    drawn = Counter(next(iter(layers_of(schedule.trained(names, step)))) for step in range(400))
    assert drawn.keys() == {"1", "4"}
    assert 150 < drawn["1"] < 250


def test_the_heaviest_set_bounds_every_step():
    generator = torch.Generator().manual_seed(0)
    sizes = {name: int(torch.randint(1, 1000, (), generator=generator)) for name in NAMES}
    schedule = LayerSampling(LAYERS, 3, 1, seed=0)
    bound = sum(sizes[name] for name in schedule.heaviest(sizes))
    weights = [sum(sizes[name] for name in schedule.trained(NAMES, step)) for step in range(3000)]
    assert max(weights) == bound  # 220 sets, so each is met


def test_layers_of_every_family():
    for family in ("llama", "qwen3_moe"):
        model = tiny(family)
        schedule = install(model, {"type": "lisa", "num_layers": 1}).trainable_schedule
        names = [name for name, _ in model.named_parameters()]
        trained = schedule.trained(names, 0)
        resting = set(names) - trained
        assert layers_of(trained) | layers_of(resting) == {"0", "1"}
        assert layers_of(trained) & layers_of(resting) == set()
        assert all(".layers." in name for name in resting)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_can_be_frozen(tied):
    model = tiny(tie_word_embeddings=tied)
    install(model, {"type": "lisa", "train_embeddings": False})
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})


def test_what_cannot_be_done_is_refused():
    with pytest.raises(
        ConfigError, match=r"lisa\.num_layers=3 is more than the 2 layers of the model; set num_layers: 2"
    ):
        install(tiny(), {"type": "lisa", "num_layers": 3})
    with pytest.raises(ConfigError, match="lisa and lisa both choose which parameters train"):
        install(tiny(), {"type": "lisa"}, {"type": "lisa", "every_steps": 5})


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_refuses_when_the_recipe_is_read(engine):
    if not engine.startswith("zero"):
        recipe_of(("lisa",), ENGINES[engine], "", 2)
        return
    with pytest.raises(
        ValueError, match="lisa trains other parameters in some steps .*; type engine=fsdp or engine=ddp"
    ):
        recipe_of(("lisa",), ENGINES[engine], "", 2)


def test_a_rule_that_moves_weights_by_their_gradient_is_refused():
    given = recipe_of(("lisa",), {"type": "single"}, "", 1).model_dump()
    given["techniques"].append({"type": "rigl"})
    with pytest.raises(ValueError, match="rigl moves weights by their gradients, which lisa lets rest in some steps"):
        Recipe.model_validate(given)
