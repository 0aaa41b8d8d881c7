"""What trains under each adapter method, by closed formula, and the memory of it against live tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from leanmill.plan.plan import plan
from tests.distributed import run_ranks
from tests.plan.test_plan import ENGINES, _held_after_backward, _recipe


HIDDEN, INNER, KEYS, LAYERS, VOCAB = 128, 344, 64, 3, 4099
R, BITS, GROUP = 4, 4, 8
SHAPES = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (HIDDEN, INNER)]
"""[out, in] of the targets in a layer: query, value and what leads out of the MLP."""
TARGETS = {"targets": ["q_proj", "v_proj", "down_proj"]}
REST = 2 * VOCAB * HIDDEN + (2 * LAYERS + 1) * HIDDEN + LAYERS * (HIDDEN * (HIDDEN + KEYS) + 2 * HIDDEN * INNER)
"""Everything that is no target."""

Formula = Callable[[int, int], int]
LORA: Formula = lambda out, num_in: R * (out + num_in)  # noqa: E731


def of_layers(formula: Formula) -> int:
    """Sum over all targets."""
    return LAYERS * sum(formula(*shape) for shape in SHAPES)


def peft(method, **options):
    return [{"type": "peft", "method": method, **TARGETS, **options}]


LORA_TECHNIQUE = {"type": "lora", "rank": R, **TARGETS}
LSQ_ROWS = {"type": "lsq", "weight_bits": BITS, "granularity": "row", "weight_start": "l4q", **TARGETS}
CASES = {
    "lora": ([LORA_TECHNIQUE], of_layers(LORA)),
    "lora beside": ([LORA_TECHNIQUE | {"where": "branch"}], of_layers(LORA)),
    "l4q": ([LORA_TECHNIQUE, LSQ_ROWS], of_layers(lambda out, num_in: LORA(out, num_in) + out)),
    "dora": (peft("lora", r=R, use_dora=True), of_layers(lambda out, num_in: LORA(out, num_in) + out)),
    "lora_xs": (peft("core_lora", r=R), of_layers(lambda out, num_in: R * R)),
    "moslora": (
        peft("core_lora", r=R, variant="moslora"),
        of_layers(lambda out, num_in: LORA(out, num_in) + R * R),
    ),
    # A pool for each kind of weight, as large as LoRA's factors of another rank in all layers.
    "mos": (peft("mos", r=R, pool_rank=3), of_layers(lambda out, num_in: 3 * (out + num_in))),
    "nola": (peft("nola", r=R, num_basis=8), of_layers(lambda out, num_in: 2 * 8)),
    "earned ranks": (
        peft("rank_lora", r=R, target_r=2, grow_every=1, grow_after=0),
        of_layers(lambda out, num_in: LORA(out, num_in) + R),
    ),
    "nested ranks": (peft("rank_lora", r=R, variant="dylora"), of_layers(LORA)),
    "routed": (
        peft("moe_lora", r=R, num_experts=3),
        of_layers(lambda out, num_in: 3 * LORA(out, num_in) + 3 * num_in),
    ),
    "in series": (peft("bottleneck", r=R), of_layers(lambda out, num_in: 2 * R * out)),
    "vera": (peft("vera", r=R), of_layers(lambda out, num_in: out + R)),
    "ia3": (peft("ia3", feedforward_modules=["down_proj"]), LAYERS * (HIDDEN + KEYS + INNER)),
    "hira": (peft("hira", r=R), of_layers(LORA)),
    "hra": (peft("hra", r=R), of_layers(lambda out, num_in: R * num_in)),
    "fourierft": (peft("fourierft", n_frequency=10), of_layers(lambda out, num_in: 10)),
    "peqa": ([{"type": "peqa", **TARGETS}], of_layers(lambda out, num_in: out)),
    "peqa in groups": (
        [{"type": "peqa", "group_size": GROUP, **TARGETS}],
        of_layers(lambda out, num_in: out * num_in // GROUP),
    ),
    "galore": ([{"type": "galore", "rank": R, **TARGETS}], REST + of_layers(lambda out, num_in: R * max(out, num_in))),
    # Of three layers, one at a time.
    "owlore": (
        [{"type": "lisa", "num_layers": 1}, {"type": "galore", "rank": R, **TARGETS}],
        REST
        - 2 * (2 * HIDDEN + HIDDEN * (HIDDEN + KEYS) + 2 * HIDDEN * INNER)
        + of_layers(lambda out, num_in: R * max(out, num_in)) // LAYERS,
    ),
    "lora that takes turns": ([{"type": "lisa", "num_layers": 2}, LORA_TECHNIQUE], of_layers(LORA) // LAYERS * 2),
}


@pytest.mark.parametrize("name", CASES)
def test_what_trains_is_what_the_formula_says(name):
    techniques, expected = CASES[name]
    result = plan(_recipe("single", techniques=techniques))
    assert result.num_trainable == expected
    memory = result.memory.held
    assert memory["gradients"] == memory["weights"] == 4 * expected
    assert memory["optimizer state"] == 8 * expected


def test_a_subspace_is_found_in_the_bytes_that_are_foreseen():
    given = {"type": "galore", "rank": R, **TARGETS}
    whole, sketch, drawn = (
        plan(_recipe("single", techniques=[given | {"subspace": subspace}])).memory.transient.get(
            "watched gradients", 0
        )
        for subspace in ("svd", "sketch", "random")
    )
    assert whole == 4 * of_layers(lambda out, num_in: out * num_in)
    assert sketch == 4 * of_layers(lambda out, num_in: min(out, num_in) * (R + 8))
    assert drawn == 0


@pytest.mark.parametrize(
    ("techniques", "is_whole"),
    [
        (peft("core_lora", r=R, variant="lora_sb", gradient_step=1e-3), True),
        (peft("rank_lora", r=R, target_r=2), True),
        (peft("rank_lora", r=R, target_r=2, score="factors"), False),
    ],
)
def test_the_gradient_of_a_wrapped_weight_is_foreseen(techniques, is_whole):
    watched = plan(_recipe("single", techniques=techniques)).memory.transient.get("watched gradients", 0)
    assert watched == is_whole * 4 * of_layers(lambda out, num_in: out * num_in)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "engine"), [("peqa", "fsdp"), ("galore", "fsdp")])
def test_held_memory_is_that_of_live_tensors(name, engine):
    recipe = _recipe(ENGINES[engine], techniques=CASES[name][0])
    assert plan(recipe, 2).held_bytes == pytest.approx(max(run_ranks(_held_after_backward, 2, recipe)), rel=0.1)
