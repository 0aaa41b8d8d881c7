"""Local paths of a recipe that are not there."""

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
