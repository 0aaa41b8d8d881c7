"""`leanmill init`: every template is a recipe as it stands, and nothing that is there is overwritten."""

import json
import shlex

import pytest
import yaml

from leanmill.cli.init_command import DEFAULT_MODEL, DEFAULT_VOCAB_SIZE, TEMPLATES
from leanmill.cli.main import main
from leanmill.recipe.compress import CompressRecipe
from leanmill.recipe.io import load_recipe


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_is_a_recipe(template, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine", "--template", template]) == 0
    said = capsys.readouterr().out
    assert TEMPLATES[template].command in said
    monkeypatch.chdir("mine")
    if template == "compress":
        recipe = CompressRecipe.model_validate(yaml.safe_load((tmp_path / "mine/recipe.yaml").read_text()))
    else:
        recipe = load_recipe("recipe.yaml", [])
        assert recipe.name == "mine"
        assert main(["check", "recipe.yaml"]) == 0
    assert (recipe.model.path == DEFAULT_MODEL) == (TEMPLATES[template].needs_model and template != "distill")


def test_a_local_model_is_found_from_the_new_folder(tmp_path, monkeypatch):
    (tmp_path / "a model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my sft", "--template", "sft", "--model", "a model"]) == 0
    written = yaml.safe_load((tmp_path / "my sft/recipe.yaml").read_text())
    assert written["name"] == "my sft"
    assert written["model"]["path"] == written["data"]["tokenizer"]["path"] == str(tmp_path / "a model")
    rows = (tmp_path / "my sft" / written["data"]["source"]["path"]).read_text().splitlines()
    assert all(json.loads(row)["messages"][-1]["role"] == "assistant" for row in rows)


@pytest.mark.parametrize(
    ("config", "found"), [({"vocab_size": 512}, 512), ({}, DEFAULT_VOCAB_SIZE), (None, DEFAULT_VOCAB_SIZE)]
)
def test_a_student_has_the_vocabulary_of_a_teacher_that_is_here(config, found, tmp_path, monkeypatch):
    (tmp_path / "teacher").mkdir()
    if config is not None:
        (tmp_path / "teacher/config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    assert main(["init", "student", "--template", "distill", "--model", "teacher"]) == 0
    assert load_recipe("student/recipe.yaml").model.config["vocab_size"] == found


@pytest.mark.parametrize("folder", ["yes", "null", "1e5", "a MODEL: NAME"])
def test_any_name_of_a_folder_is_text(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", folder, "--template", "sparse", "--model", "my/NAME"]) == 0
    recipe = load_recipe(tmp_path / folder / "recipe.yaml")
    assert (recipe.name, recipe.model.path) == (folder, "my/NAME")
    assert f"next: cd {shlex.quote(folder)}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["here"], "here is there already; name a new folder"),
        (["new", "--model", "gpt2"], "pretrain does not; leave it out"),
    ],
)
def test_refuses(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/notes.txt").write_text("mine")
    assert main(["init", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["here", "notes.txt"]
