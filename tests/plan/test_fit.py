"""What `plan` says where a rank has too little memory holds when it is typed."""

import shlex

import pytest

from leanmill.cli.main import main
from leanmill.plan.plan import plan
from leanmill.recipe.io import load_recipe


RECIPE = "recipes/pretrain_1b.yaml"
GIB = 2**30


def planned(memory_gib, *overrides, world_size=8):
    return plan(load_recipe(RECIPE, overrides), world_size, rank_memory_gib=memory_gib)


def test_a_plan_that_fits_has_no_remedies():
    result = planned(80)
    assert result.fits
    assert result.remedies == {}


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
def test_each_remedy_is_enough_when_it_is_typed(engine):
    result = planned(15, f"engine={engine}")
    assert not result.fits
    assert len(result.remedies) >= 1
    for typed, peak in result.remedies.items():
        again = planned(15, f"engine={engine}", *shlex.split(typed))
        assert again.fits, typed
        assert again.peak_bytes == peak


def test_changes_that_are_not_enough_alone_are_joined():
    result = planned(3.5)
    ((typed, peak),) = result.remedies.items()
    assert peak <= 3.5 * GIB
    assert typed.startswith("train.activation_checkpointing=full batch.tokens_per_micro_batch=")
    assert planned(3.5, *shlex.split(typed)).fits


def test_where_nothing_is_enough_the_best_is_said(capsys):
    assert main(["plan", RECIPE, "--gpus-per-node", "8", "--rank-memory-gib", "0.1"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT: a rank needs about 19.82 GiB and has 102.4 MiB\n" in out
    assert "not enough either, at " in out
    assert "take a smaller model or ranks with more memory" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "fits: a rank needs about 19.82 GiB of its 80.00 GiB (assumed; give yours with --rank-memory-gib)\n"),
        (["--rank-memory-gib", "21"], "fits: a rank needs about 19.82 GiB of its 21.00 GiB, which leaves little"),
        (["--rank-memory-gib", "8"], "DOES NOT FIT: a rank needs about 19.82 GiB and has 8.00 GiB\n"),
    ],
)
def test_the_verdict_is_plain(arguments, line, capsys):
    assert main(["plan", RECIPE, "--gpus-per-node", "8", *arguments]) == 0
    assert line in capsys.readouterr().out
