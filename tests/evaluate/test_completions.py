import json

import pytest

from leanmill.core.errors import ConfigError
from leanmill.evaluate.completions import ask, read_items
from leanmill.recipe.evaluate import Completions
from tests.evaluate.parrots import Parrot, asked


def says(texts):
    """Continues each prompt with its text, then ends."""

    def next_of(prefix):
        so_far = "".join(map(chr, prefix))
        prompt = next(prompt for prompt in texts if so_far.startswith(prompt))
        return ord((texts[prompt] + "\0")[len(so_far) - len(prompt)])

    return Parrot(next_of)


def task(tmp_path, items, **more):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return Completions.model_validate({"type": "completions", "path": str(path), **more})


def test_answers_are_compared_word_for_word_and_counted_by_group(tmp_path):
    items = [
        {"prompt": "a:", "answer": "red", "group": "colours"},
        {"prompt": "b:", "answer": ["blue", "azure"], "group": "colours"},
        {"prompt": "c:", "answer": "red", "group": "colours"},
        {"prompt": "d:", "answer": "one two", "group": "numbers"},
    ]
    model = says({"a:": " red\nand on", "b:": "azure", "c:": "redder\n", "d:": " one two  \n"})
    config = task(tmp_path, items)
    scores = ask(config, read_items(config), asked(model))
    assert [(s.group, s.value, s.count) for s in scores] == [
        ("colours", 2 / 3, 3),
        ("numbers", 1.0, 1),
        ("all", 0.75, 4),
    ]
    assert scores[0].items == (True, True, False)


def test_a_continuation_that_cannot_become_an_answer_is_not_gone_on_with(tmp_path):
    model = says({"a:": "blue and so on for long"})
    config = task(tmp_path, [{"prompt": "a:", "answer": "black"}])
    assert ask(config, read_items(config), asked(model))[0].value == 0
    assert model.num_rows == 3  # `b` and `l` fit, `u` does not


def test_the_last_token_allowed_decides(tmp_path):
    model = says({"a:": "12345"})
    for most, right in ((3, 1.0), (4, 0.0)):
        config = task(tmp_path, [{"prompt": "a:", "answer": "123"}], max_new_tokens=most, stops=["."])
        assert ask(config, read_items(config), asked(model))[0].value == right


def test_texts_may_hold_other_ends_of_lines(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"prompt": "a\u2028b", "answer": "c"}\r\n\n{"prompt": "d", "answer": "e"}', encoding="utf-8")
    items = read_items(Completions(type="completions", path=str(path)))
    assert [item.prompt for item in items] == ["a\u2028b", "d"]
    path.write_bytes(b'{"prompt": "caf\xe9", "answer": "c"}')
    with pytest.raises(ConfigError, match="is not UTF-8 .* at byte 15"):
        read_items(Completions(type="completions", path=str(path)))


def test_bad_files_and_prompts_that_do_not_fit(tmp_path):
    for items, message in [
        ([{"prompt": "a"}], "line 1 is no item"),
        ([{"prompt": "a", "answer": "b\nc"}], "holds one of stops"),
        ([{"prompt": "a", "answer": []}], "a text or a list"),
        ([], "holds no item"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_items(task(tmp_path, items))
    with pytest.raises(ConfigError, match="does not exist"):
        read_items(Completions(type="completions", path=str(tmp_path / "none")))
    config = task(tmp_path, [{"prompt": "a" * 10, "answer": "b"}], limit=1)
    with pytest.raises(ConfigError, match="longer than the model's 40"):
        ask(config, read_items(config), asked(Parrot(lambda prefix: 1, longest=40)))
