"""Local paths of a recipe that are not there."""

from contextlib import nullcontext

import pytest

from leanmill.core.errors import ConfigError
from leanmill.recipe.io import validate_recipe
from leanmill.recipe.local_files import check_files


def recipe(template):
    return validate_recipe(
        {
            "model": {"config": {"model_type": "llama"}},
            "data": {"tokenizer": {"chat_template": template}},
            "train": {"steps": 1},
        }
    )


def test_a_chat_template_in_a_file_is_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.chat_template='gone\.jinja' does not exist"):
        check_files(recipe("gone.jinja"))
    (tmp_path / "chat[1].jinja").write_text("{{ messages }}")
    check_files(recipe(str(tmp_path / "chat[1].jinja")))
    check_files(recipe("{{ messages }}"))


@pytest.mark.parametrize(("resume", "is_refused"), [("s3://bucket/run", False), ("runs/not-there", True)])
def test_a_checkpoint_to_resume_may_be_a_url(resume, is_refused):
    asked = recipe(None)
    asked = asked.model_copy(update={"checkpoint": asked.checkpoint.model_copy(update={"resume": resume})})
    with pytest.raises(ConfigError, match="checkpoint.resume") if is_refused else nullcontext():
        check_files(asked)


def test_what_an_earlier_phase_leaves_is_not_looked_for_yet(tmp_path):
    raw = {
        "model": {"config": {"model_type": "llama"}},
        "run_dir": str(tmp_path / "run"),
        "train": {"steps": 1},
        "phases": [
            {"name": "dense", "overrides": {"train.steps": 1}},
            {"name": "distil", "overrides": {"techniques": [{"type": "distill", "teacher": "phase:dense"}]}},
        ],
    }
    check_files(validate_recipe(raw))
    raw["phases"][1]["overrides"]["techniques"][0]["teacher"] = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="elsewhere' does not exist"):
        check_files(validate_recipe(raw))
