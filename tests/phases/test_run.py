"""Runs of several phases: what they hand over, exactly, and where they go on after a kill."""

import json
import shutil

import pytest
import torch

import leanmill.trainer.passes.run as passes_run
from leanmill.checkpoint.finding import locate
from leanmill.checkpoint.reading import read_full_state
from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.export import export_model
from leanmill.phases.run import run
from leanmill.recipe.compress import CompressRecipe
from leanmill.recipe.root import Recipe
from leanmill.trainer.passes.folder import SourceFolder
from leanmill.trainer.passes.run import compress
from leanmill.trainer.rebuild import rebuild
from leanmill.trainer.run import run as run_one
from tests.data.samples import write_texts
from tests.distributed import run_ranks
from tests.kills import POINTS, Moment, fork_ranks, fork_train, records


SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = {"config": {"model_type": "llama", "num_key_value_heads": 1, "max_position_embeddings": 32, **SIZES}}
WANDA = {"type": "wanda", "num_kept": 2, "group_size": 4}
CALIBRATION = {"num_rows": 4, "rows_per_batch": 2}
LSQ = [{"type": "nm_sparsity"}, {"type": "lsq", "weight_bits": 4}]
DENSE = {"name": "dense", "overrides": {"train.steps": 3}}
PRUNE = {"name": "prune", "passes": [WANDA], "calibration": CALIBRATION}
RETRAIN = {
    "name": "retrain",
    "overrides": {"train.steps": 3, "eval.at_start": True, "techniques": [{"type": "nm_sparsity"}]},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    write_texts(folder / "a.jsonl", 60)
    return folder


def recipe(home, run_dir, *phases, **more):
    base = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "model": MODEL,
        "data": {
            "source": {"type": "hf", "path": str(home / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(home / "cache"),
        },
        "schedule": {"type": "constant", "warmup_steps": 0},
        "batch": {"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        "train": {"precision": "fp32"},
        "eval": {"tokens_per_domain": 32},
        "log": {"tensorboard": False, "report": False, "every_steps": 1},
        "phases": list(phases),
    }
    return Recipe.model_validate(base | more)


def weights(folder, part="model"):
    return read_full_state(locate(folder).path, part)


def read_folder(folder):
    source = SourceFolder(folder)
    return source.read(source.keys)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def three(home):
    """Dense, pruned, trained again, in one process and without a break."""
    result = run(recipe(home, home / "three", DENSE, PRUNE, RETRAIN))
    assert (result.status, result.step) == ("finished", 6)
    return home / "three"


def test_equals_the_same_by_hand(home, three, tmp_path):
    run_one(recipe(home, tmp_path / "dense", train={"steps": 3, "precision": "fp32"}))
    export_model(locate(tmp_path / "dense").path, tmp_path / "model")
    data = recipe(home, tmp_path, DENSE).data
    compress(
        CompressRecipe(
            device="cpu", precision="fp32", model={"path": str(tmp_path / "model")}, data=data, passes=[WANDA],
            calibration=CALIBRATION,
        ),
        tmp_path / "pruned",
    )  # fmt: skip
    run_one(
        recipe(
            home,
            tmp_path / "retrained",
            model={"path": str(tmp_path / "pruned")},
            data={**data.model_dump(), "tokenizer": {"path": str(tmp_path / "pruned")}},
            train={"steps": 3, "precision": "fp32"},
            techniques=[{"type": "nm_sparsity"}],
        )
    )
    for part in ("model", "optimizer"):
        assert_equal(weights(three, part), weights(tmp_path / "retrained", part))


def test_one_stretch_of_training_is_not_what_phases_ask_for(home, tmp_path):
    with pytest.raises(ConfigError, match=r"call leanmill\.phases\.run\.run"):
        run_one(recipe(home, tmp_path / "run", DENSE))


def test_finished_phases_are_not_done_again(home, three, monkeypatch):
    def never(*_):
        raise AssertionError("done again")

    monkeypatch.setattr("leanmill.phases.run.run_in", never)
    monkeypatch.setattr("leanmill.phases.run.compress_in", never)
    result = run(recipe(home, three, DENSE, PRUNE, RETRAIN))
    assert (result.status, result.step) == ("finished", 6)


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        (({**DENSE, "overrides": {"train.steps": 4}}, PRUNE, RETRAIN), "train.steps 3 -> 4"),
        ((DENSE, {**PRUNE, "passes": [{**WANDA, "num_kept": 1}]}, RETRAIN), "02-prune is finished.*passes"),
        ((DENSE, PRUNE, {**RETRAIN, "overrides": {"train.steps": 3}}), "techniques.nm_sparsity"),
        ((DENSE, PRUNE, {**RETRAIN, "start_from": "dense"}), "start_from prune -> dense"),
    ],
)
def test_a_finished_phase_that_is_asked_for_otherwise_is_refused(home, three, phases, says):
    with pytest.raises(ConfigError, match=says) as caught:
        run(recipe(home, three, *phases))
    assert "to do them again, or give another run_dir" in str(caught.value)


def test_never_resuming_refuses_a_run_that_began(home, three):
    with pytest.raises(ConfigError, match="has phases that began"):
        run(recipe(home, three, DENSE, PRUNE, RETRAIN, checkpoint={"resume": "never"}))


def test_a_later_phase_without_the_one_it_came_from_is_refused(home, three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/phases/02-prune")
    with pytest.raises(ConfigError, match="03-retrain is finished, and .*02-prune, which it came from, is not there"):
        run(recipe(home, tmp_path / "copy", DENSE, PRUNE, RETRAIN))


def test_commands_take_the_last_phase(three, tmp_path, capsys):
    assert main(["export", "--checkpoint", str(three), "--to", "hf", "--out", str(tmp_path / "out")]) == 0
    assert "03-retrain" in capsys.readouterr().out
    assert main(["eval", "--checkpoint", str(three), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert main(["report", str(three)]) == 0
    assert capsys.readouterr().out.count("report: ") == 2


def test_a_run_that_ends_with_passes_says_where_its_model_is(home, three, tmp_path, capsys):
    shutil.copytree(three, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/phases/03-retrain")
    assert main(["export", "--checkpoint", str(tmp_path / "copy"), "--to", "hf", "--out", str(tmp_path / "out")]) == 2
    assert "02-prune ran passes only" in capsys.readouterr().err


def test_a_run_folder_is_no_model(home, three):
    with pytest.raises(ConfigError, match=rf"{three} is a run.* leanmill export --checkpoint {three} --to hf"):
        run(recipe(home, home / "other", PRUNE, model={"path": str(three)}))


def test_everything_kept_is_one_long_run(home, tmp_path):
    """What stages learned, the moments and the position in the data go on as if nothing had been between."""
    run_one(recipe(home, tmp_path / "whole", techniques=LSQ, train={"steps": 4, "precision": "fp32"}))
    half = {"train.steps": 2}
    run(
        recipe(
            home,
            tmp_path / "two",
            {"overrides": half},
            {"overrides": half, "keep": ["optimizer", "data"]},
            techniques=LSQ,
        )
    )
    for part in ("model", "optimizer"):
        assert_equal(weights(tmp_path / "two", part), weights(tmp_path / "whole", part))


def test_state_goes_on_and_weights_are_folded(home, tmp_path):
    start = {"name": "a", "overrides": {"train.steps": 2}}
    frozen = {"train.steps": 1, "optimizer.lr": 1e-30, "optimizer.weight_decay": 0}
    run(
        recipe(
            home, tmp_path / "run", start,
            {"name": "state", "overrides": frozen},
            {"name": "weights", "start_from": "a", "carry": "weights", "overrides": frozen},
            techniques=LSQ,
        )
    )  # fmt: skip
    first, state, folded = (weights(tmp_path / f"run/phases/{name}") for name in ("01-a", "02-state", "03-weights"))
    assert_equal(state, first)
    name = "model.layers.0.mlp.up_proj.weight"
    expected = rebuild(locate(tmp_path / "run/phases/01-a").path).model.get_submodule(name[:-7]).folded_weight()
    torch.testing.assert_close(folded[name], expected, rtol=0, atol=1e-20)
    assert not torch.equal(folded[name], first[name])


@pytest.mark.slow
def test_branches_are_merged(home, tmp_path):
    other = {"name": "other", "start_from": "base", "overrides": {"train.steps": 2, "optimizer.lr": 0.01}}
    merging = {"name": "merge", "start_from": "dense", "passes": [{"type": "branch_merge", "models": ["phase:other"]}]}
    run(recipe(home, tmp_path, DENSE, other, merging))
    first, second, merged = (
        read_folder(tmp_path / "phases" / name / "model") for name in ("01-dense", "02-other", "03-merge")
    )
    for name, tensor in merged.items():
        taken = tensor == second[name]
        assert torch.equal(tensor, torch.where(taken, second[name], first[name]))
    num_taken = sum(int((tensor != first[name]).sum()) for name, tensor in merged.items())
    assert 0 < num_taken < 0.5 * sum(tensor.numel() for tensor in merged.values())


def test_rewinds_to_a_step_of_an_earlier_phase(home, tmp_path):
    run(
        recipe(
            home, tmp_path / "run", DENSE,
            {"name": "early", "start_from": "dense@1", "overrides": {"train.steps": 2}, "keep": ["data", "optimizer"]},
            {"name": "again", "start_from": "base", "overrides": {"train.steps": 3}},
        )
    )  # fmt: skip
    phases = tmp_path / "run/phases"
    for name in ("02-early", "03-again"):
        assert_equal(weights(phases / name), weights(phases / "01-dense"))
    assert (phases / "01-dense/checkpoints/step-00000001").is_dir()


def test_a_lottery_ticket_has_the_zeros_of_the_end_and_the_weights_of_the_beginning(home, tmp_path):
    ticket = {
        "passes": [{"type": "magnitude", "sparsity": 0.5}],
        "calibration": CALIBRATION,
        "rewind_to": "dense@1",
        "overrides": {"train.steps": 2, "techniques": [{"type": "static_mask"}]},
    }
    control = ticket | {"start_from": "dense", "rewind_to": "fresh", "overrides": None}
    run(recipe(home, tmp_path / "run", DENSE, {**control, "name": "control"}, {**ticket, "start_from": "dense"}))
    phases = tmp_path / "run/phases"
    early, late = (read_full_state(phases / f"01-dense/checkpoints/step-0000000{step}", "model") for step in (1, 3))
    begun, drawn = read_folder(phases / "03-magnitude/passed"), read_folder(phases / "02-control/model")
    for name, value in begun.items():
        if name.endswith("_proj.weight"):
            kept = value != 0
            assert kept.float().mean() == 0.5
            assert late[name][kept].abs().min() >= late[name][~kept].abs().max()
            assert torch.equal(value[kept], early[name][kept])
            assert torch.equal(drawn[name] != 0, kept)
            assert not torch.isclose(drawn[name], early[name])[kept].any()
            assert 0.5 < drawn[name][kept].std() / early[name][kept].std() < 2
        else:
            assert torch.equal(value, early[name]), name
    trained = weights(tmp_path / "run")
    assert all(torch.equal(trained[name] == 0, begun[name] == 0) for name in begun if name.endswith("_proj.weight"))
    assert not torch.equal(trained["model.norm.weight"], begun["model.norm.weight"])


@pytest.mark.slow
def test_distillation_stops_before_the_end(home, tmp_path):
    """As the page of distill has it: the state and the moments go on, the teacher and its loss do not."""
    distil = [{"type": "distill", "teacher": "phase:dense"}]
    student = {"name": "distil", "start_from": "base", "overrides": {"train.steps": 2, "techniques": distil}}
    alone = {"name": "alone", "carry": "state", "overrides": {"train.steps": 2, "techniques": []}}
    run(recipe(home, tmp_path / "run", DENSE, student, alone | {"keep": ["optimizer", "data"]}))
    assert (tmp_path / "run/phases/01-dense/model/config.json").is_file()
    first, second = (tmp_path / "run/phases" / name for name in ("02-distil", "03-alone"))
    assert all("distill" in record["losses"] for record in records(first, "step"))
    assert all("distill" not in record["losses"] for record in records(second, "step"))
    state = {name for name in weights(second, "optimizer") if "step" in name}
    assert state
    assert all(int(weights(second, "optimizer")[name]) == 4 for name in state)


def test_a_state_that_does_not_fit_is_refused_before_the_first_phase(home, tmp_path):
    phases = DENSE, {"carry": "state", "overrides": {"train.steps": 1, "techniques": LSQ}}
    with pytest.raises(ConfigError, match=r"phases.1 \(train\): carry: state .*type carry: weights"):
        run(recipe(home, tmp_path / "run", *phases))
    assert not (tmp_path / "run/phases").exists()


def test_what_cannot_be_folded_is_refused_before_the_first_phase(home, tmp_path):
    techniques = [{"type": "lora", "rank": 2, "where": "branch"}, {"type": "nm_sparsity"}]
    first = {"overrides": {"train.steps": 1, "techniques": techniques}}
    with pytest.raises(ConfigError, match="cannot be merged"):
        run(recipe(home, tmp_path / "run", first, DENSE))
    assert not (tmp_path / "run/phases").exists()


def test_adapters_over_a_model_of_the_run_survive_a_move(home, tmp_path):
    lora = {"name": "lora", "overrides": {"train.steps": 2, "techniques": [{"type": "lora", "rank": 2}]}}
    run(recipe(home, tmp_path / "run", DENSE, lora))
    checkpoint = locate(tmp_path / "run").path
    expected = rebuild(checkpoint).model.state_dict()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = locate(tmp_path / "moved").path
    assert_equal(rebuild(moved).model.state_dict(), expected)
    longer = {**lora, "overrides": {**lora["overrides"], "train.steps": 3}}
    (tmp_path / "moved/phases/02-lora/done.json").unlink()
    assert run(recipe(home, tmp_path / "moved", DENSE, longer)).step == 6


@pytest.mark.parametrize(
    "moments",
    [
        [Moment("update", 2), Moment("block", 2), Moment("update", 2, "after")],
        [Moment("snapshot", 1, "after"), Moment("place", 1), Moment("snapshot", 2)],
    ],
    ids=["in the middle of phases", "at their ends"],
)
def test_killed_inside_phases_it_ends_as_if_it_had_not_been(home, three, tmp_path, moments, monkeypatch):
    """In the first training, in the passes or while their result is put in place, in the second training."""
    from leanmill.recipe.io import resolved_yaml
    from leanmill.trainer.passes.stream import BlockStream

    monkeypatch.setitem(POINTS, "block", (BlockStream, "advance"))
    monkeypatch.setitem(POINTS, "place", (passes_run.TargetFolder, "close"))
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved_yaml(recipe(home, tmp_path / "run", DENSE, PRUNE, RETRAIN, checkpoint={"every_steps": 1})))
    began = []
    for moment in [*moments, None]:
        child = fork_train(path, tmp_path / "log", prepare=moment.arm if moment else lambda: None)
        assert child.wait() == (-9 if moment else 0), child.output[-3000:]
        began.append([line for line in child.output.splitlines() if "phase" in line and " of 3: " in line])
    assert [lines[0].rpartition(" ")[2] for lines in began] == ["dense", "dense", "prune", "retrain"]
    for part in ("model", "optimizer"):
        assert_equal(weights(tmp_path / "run", part), weights(three, part))
    assert not list((tmp_path / "run").rglob("*.tmp*"))


def test_what_a_phase_begins_with_is_evaluated_where_asked(three):
    scores = {
        record["step"]: record["domains"]["all"]["loss"] for record in records(three / "phases/03-retrain", "eval")
    }
    assert scores.keys() == {0, 3}
    assert scores[0] != scores[3]


@pytest.mark.slow
def test_ranks_killed_in_passes_and_in_training(home, tmp_path, monkeypatch):
    """Whichever rank dies, all start again and end as if nothing had happened."""
    from leanmill.recipe.io import resolved_yaml
    from leanmill.trainer.passes.stream import BlockStream

    monkeypatch.setitem(POINTS, "block", (BlockStream, "advance"))
    engine, often = {"type": "fsdp"}, {"every_steps": 1}
    for name, moments in (
        ("whole", [{}]),
        ("killed", [{1: Moment("block", 1)}, {0: Moment("place", 1)}, {1: Moment("update", 2)}, {}]),
    ):
        monkeypatch.setitem(POINTS, "place", (passes_run.TargetFolder, "close"))
        path = tmp_path / f"{name}.yaml"
        given = recipe(home, tmp_path / name, DENSE, PRUNE, RETRAIN, engine=engine, checkpoint=often)
        path.write_text(resolved_yaml(given))
        for by_rank in moments:
            children = fork_ranks(path, tmp_path / f"{name}.log", 2, moments=by_rank)
            codes = [child.wait() for child in children]
            assert [code == 0 for code in codes] == [not by_rank] * 2, children[0].output[-3000:]
    for part in ("model", "optimizer"):
        assert_equal(weights(tmp_path / "killed", part), weights(tmp_path / "whole", part))


def _run_on_two_ranks(given):
    return run(given).step


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param({"type": "fsdp"}, id="fsdp"),
        pytest.param({"type": "deepspeed", "stage": 3}, id="zero3", marks=pytest.mark.slow),
    ],
)
def test_several_ranks_give_what_one_process_gives(home, three, tmp_path, engine):
    given = recipe(home, tmp_path / "run", DENSE, PRUNE, RETRAIN, engine=engine)
    assert run_ranks(_run_on_two_ranks, 2, given) == [6, 6]
    expected = weights(three)
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
