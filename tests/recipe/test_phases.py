"""Phases in a recipe: what they mean, what is refused and in which words."""

import copy
import re

import pytest

from leanmill.cli.main import main
from leanmill.core.errors import ConfigError
from leanmill.recipe.explain import explain
from leanmill.recipe.io import apply_override, load_recipe, resolved_yaml, validate_recipe
from leanmill.recipe.phases import merged, phase_names, source_of, trained_before
from leanmill.recipe.schema import recipe_schema


LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SEVERAL = {"type": "ziplm", "speedup": 2, "further_speedups": [1.5]}
WANDA = {"type": "wanda", "num_kept": 2, "group_size": 4}
DENSE = {"name": "dense", "overrides": {"train.steps": 10}}


def recipe(*phases, **more):
    return validate_recipe({"model": {"config": LLAMA}, "phases": list(phases), **more})


def refused(*phases, **more):
    with pytest.raises(ConfigError) as caught:
        recipe(*phases, **more)
    return str(caught.value)


def test_overrides_are_written_over_the_recipe_dotted_or_nested():
    found = recipe(
        DENSE,
        {"overrides": {"train": {"total_tokens": 64_000}, "optimizer.lr": 1e-5, "techniques": [{"type": "ternary"}]}},
        train={"precision": "fp32"},
    )
    first, second = (found.of_phase(index) for index in (0, 1))
    assert (first.train.steps, first.train.total_tokens, first.train.precision) == (10, None, "fp32")
    assert (second.train.steps, second.train.total_tokens) == (None, 64_000)
    assert (first.optimizer.lr, second.optimizer.lr) == (1e-3, 1e-5)
    assert [len(one.techniques) for one in (first, second)] == [0, 1]
    assert not first.phases
    assert (first.name, first.run_dir) == ("run-dense", "runs/run/phases/01-dense")
    assert second.run_dir == "runs/run/phases/02-train"


def test_a_phase_that_gives_one_length_drops_the_other():
    found = recipe({"overrides": {"train.steps": 7}}, {}, train={"total_tokens": 327_680})
    assert [(one.train.steps, one.train.total_tokens) for one in found.training_phases()] == [
        (7, None),
        (None, 327_680),
    ]


def test_another_type_replaces_the_whole_section():
    found = recipe(
        {"overrides": {"optimizer": {"type": "lion", "lr": 1e-4}}}, train={"steps": 1}, optimizer={"eps": 1e-6}
    )
    assert found.of_phase(0).optimizer.type == "lion"


def test_places_of_a_list_can_be_overridden():
    found = recipe(
        {"overrides": {"techniques.0.num_kept": 1, "techniques.1": {"type": "ternary"}}},
        train={"steps": 1},
        techniques=[{"type": "nm_sparsity"}],
    ).of_phase(0)
    assert [technique.type for technique in found.techniques] == ["nm_sparsity", "ternary"]
    assert found.techniques[0].num_kept == 1
    assert merged([1, 2], {"2": 3}) == [1, 2, 3]


def test_the_command_line_reaches_into_a_phase():
    raw = {"model": {"config": LLAMA}, "phases": [copy.deepcopy(DENSE)]}
    apply_override(raw, "phases.0.overrides.train.steps=3")
    assert validate_recipe(raw).of_phase(0).train.steps == 3


def test_names_and_where_a_phase_starts():
    phases = recipe(
        DENSE,
        {"passes": [WANDA]},
        {"overrides": {"train.steps": 1}},
        {"start_from": "dense@3", "passes": [WANDA], "overrides": {"train.steps": 1}},
        {"start_from": "base"},
        train={"steps": 3},
    ).phases
    assert phase_names(phases) == ["dense", "wanda", "train", "wanda-2", "train-2"]
    assert [source_of(phases, i) for i in range(5)] == [(None, None), (0, None), (1, None), (0, 3), (None, None)]
    assert trained_before(phases, 2) == (0, None)
    assert [phase.trains for phase in phases] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("techniques", "more", "expected"),
    [
        ([{"type": "ternary"}], {}, True),
        ([{"type": "ternary"}], {"carry": "weights"}, False),
        ([{"type": "ternary"}], {"passes": [WANDA]}, False),
        ([], {}, False),
        ([], {"carry": "state"}, True),
    ],
)
def test_the_checkpoint_itself_goes_on_where_techniques_are_the_same(techniques, more, expected):
    found = recipe(
        {"overrides": {"train.steps": 1, "techniques": [{"type": "ternary"}]}},
        {"overrides": {"train.steps": 1, "techniques": techniques}, **more},
    )
    assert found.carries_state(1, found.training_phases()) is expected


def test_techniques_name_the_model_of_an_earlier_phase():
    teacher = {"type": "distill", "teacher": "phase:dense"}
    student = {"name": "student", "overrides": {"train.steps": 5, "techniques": [teacher]}}
    found = recipe(DENSE, student, run_dir="some/{name}")
    assert found.of_phase(1).techniques[0].teacher == "some/run/phases/01-dense/model"
    assert (found.phases_read_by(0), found.phases_read_by(1)) == ([], [0])
    later = refused(student, DENSE)
    assert "phases.0 (student): phase:dense must name a phase before this one" in later
    misspelt = teacher | {"teacher": "phase:dens"}
    overrides = student["overrides"] | {"techniques": [misspelt]}
    assert "did you mean 'dense'?" in refused(DENSE, {"overrides": overrides})
    assert "techniques.0.teacher=phase:dense names a phase, and the recipe has none" in refused(
        techniques=[teacher], train={"steps": 1}
    )


def test_round_trips(tmp_path):
    found = recipe(DENSE, {"name": "prune", "passes": [WANDA]})
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved_yaml(found))
    assert load_recipe(path) == found


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("engine", "fsdp", "all phases share one set of processes"),
        ("engine.type", "fsdp", "all phases share one set of processes"),
        ("layout.ep", 2, "it holds for all phases"),
        ("run_dir", "x", "a phase has its folder inside the run's"),
        ("seed", 1, "set it once for the whole recipe"),
        ("model.path", "x", "type phases.1.start_from to choose which"),
        ("checkpoint.resume", "auto", "phases continue by themselves"),
        ("phases", [], "phases hold no phases"),
    ],
)
def test_what_no_phase_changes_is_refused_with_what_to_do(key, value, says):
    text = refused(DENSE, {"overrides": {"train.steps": 1, key: value}})
    assert says in text
    assert "phases.1.overrides." in text


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ([{"passes": [WANDA]}], "its passes need a model that exists; set model.path"),
        ([DENSE, DENSE], "the name 'dense' is an earlier phase's; give another"),
        ([DENSE, {"start_from": "dens"}], "'dens' is unknown; did you mean 'dense'?"),
        ([{"start_from": "dense", **DENSE, "name": "a"}, DENSE], "'dense' comes later"),
        ([{**DENSE, "start_from": "dense"}], "'dense' is this phase"),
        ([DENSE, {"start_from": "dense@soon"}], "type e.g. start_from: dense@100"),
        ([DENSE, {"start_from": "dense@11", "overrides": {"train.steps": 1}}], "dense@11 is past its 10 steps"),
        ([DENSE, {"passes": [WANDA]}, {"start_from": "wanda@3"}], "does not train; remove @3"),
        ([DENSE, {"carry": "state", "passes": [WANDA], "overrides": {"train.steps": 1}}], "carry: state is for"),
        ([DENSE, {"keep": ["optimizer"], "carry": "weights", "overrides": {"train.steps": 1}}], "type carry: state"),
        ([{**DENSE, "keep": ["data"]}], "keep is for training that comes after training"),
        ([DENSE, {"keep": ["data"], "overrides": {"train.total_tokens": 32_768}}], "length as train.steps=1"),
        ([DENSE, {"keep": ["data"], "overrides": {"train.steps": 1, "data.task": "sft"}}], "data.task=sft needs chats"),
        ([DENSE, {"keep": ["data"], "overrides": {"train.steps": 1, "data.sequence_length": 512}}], "overrides data"),
        (
            [DENSE, {"keep": ["optimizer"], "overrides": {"train.steps": 1, "optimizer.type": "lion"}}],
            "needs the optimizer that the moments are of, adamw, and this phase has lion",
        ),
        ([DENSE, {}], "phases.1 (train): the length of the run is missing"),
        ([DENSE, {"overrides": {"train.stepz": 1}}], "phases.1 (train): unknown key train.stepz; did you mean"),
        ([DENSE, {"overrides": {"train.steps": 1, "techniques": [{"type": "ternry"}]}}], "did you mean ternary"),
        ([DENSE, {"overrides": {"train.steps": 1, "techniques.3.type": "ternary"}}], "place 3 of a list of 0"),
        ([DENSE, {"passes": [{"type": "wnda"}]}], "did you mean wanda"),
        ([DENSE, {"passes": [{**WANDA, "num_kpt": 2}]}], "phases.1.passes.0.num_kpt; did you mean 'num_kept'?"),
        ([{**DENSE, "name": "a/b"}], "must be a short folder name"),
        ([{"overrides": {"a" + ".a" * 5000: 1}}], "a key has 5001 levels"),
        ([DENSE, {"rewind_to": "dense"}], "rewind_to is for a phase with passes"),
        ([DENSE, {"passes": [WANDA], "rewind_to": "base"}], "rewind_to must name a phase that trains"),
        ([DENSE, {"passes": [WANDA], "rewind_to": "dens@1"}], "rewind_to: dens@1 must name an earlier phase"),
        ([DENSE, {"passes": [WANDA], "rewind_to": "dense@11"}], "dense@11 is past its 10 steps"),
        ([DENSE, {"passes": [SEVERAL, WANDA]}], "put ziplm last, or ask it for one model"),
    ],
)  # fmt: skip
def test_wrong_phases_are_refused_in_one_line(phases, says):
    text = refused(*phases)
    assert says in text
    assert text.count("\n") == 0, text


def test_phases_are_not_kept_in_an_object_store():
    assert "put run_dir on storage that outlives the machine" in refused(DENSE, checkpoint={"remote": "s3://b/x"})


def test_a_phase_that_begins_with_no_model_of_before_may_have_its_own():
    own = {"start_from": "base", "overrides": {"train.steps": 1, "model.config.num_hidden_layers": 1}}
    found = recipe(DENSE, own)
    assert [one.model.config["num_hidden_layers"] for one in found.training_phases()] == [2, 1]
    text = refused(DENSE, {**own, "start_from": None})
    assert "type phases.1.start_from to choose which, or base" in text
    assert "starts from a model of its own" in explain(found)


PREPARED = {"source": {"type": "prepared", "path": "prepared"}}
BEST = {"name": "best", "start_from": "base", "score": {"teacher_model": "phase:dense", "reference_model": "x"}}


def test_a_phase_that_scores_trains_on_the_best_documents():
    found = recipe(DENSE, {**BEST, "overrides": {"train.steps": 1}}, data=PREPARED)
    source = found.of_phase(1).data.source
    assert (source.scores, source.kept_share) == ("runs/run/phases/02-best/scored", 0.5)
    assert found.of_phase(0).data.source.scores is None
    assert found.phases_read_by(1) == [0]
    assert "documents are scored by phase:dense against x first" in explain(found)


@pytest.mark.parametrize(
    ("phase", "data", "says"),
    [
        (BEST, {}, "score needs prepared text, and data.source is local_corpus"),
        ({**BEST, "score": {"teacher_model": "phase:dens", "reference_model": "x"}}, PREPARED, "did you mean 'dense'?"),
        ({**BEST, "start_from": None, "passes": [WANDA]}, PREPARED, "score is for a phase that only trains"),
        ({**BEST, "overrides": {"data.source.scores": "x"}}, PREPARED, "remove data.source.scores"),
    ],
)
def test_what_a_phase_cannot_score_is_refused(phase, data, says):
    given = {**phase, "overrides": {"train.steps": 1, **phase.get("overrides", {})}}
    assert says in refused(DENSE, given, data=data)


def test_a_checkpoint_to_resume_is_each_phases_own():
    assert "each phase has its own" in refused(DENSE, checkpoint={"resume": "runs/x"})


def test_the_schema_knows_passes():
    schema = recipe_schema()
    passes = schema["$defs"]["PhaseConfig"]["properties"]["passes"]["items"]
    assert {"wanda", "sparsegpt", "gptq", "magnitude"} <= set(passes["discriminator"]["mapping"])
    assert set(schema["$defs"]) >= {
        reference.rpartition("/")[2] for reference in passes["discriminator"]["mapping"].values()
    }


def test_check_explains_each_phase_and_tries_its_model(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        resolved_yaml(recipe(DENSE, {"passes": [WANDA]}, {"overrides": {"train.steps": 2, "optimizer.lr": 1e-5}}))
    )
    assert main(["check", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "phase 2, wanda: starts from the model, techniques folded, of dense" in shown
    assert re.findall(r"  length +(\d+) optimizer steps", shown) == ["10", "2"]
    assert shown.count("  model ") == 1
    assert main(["check", str(path), "phases.1.passes.0.group_size=7"]) == 2
    assert "phases.1 (wanda): " in capsys.readouterr().err
