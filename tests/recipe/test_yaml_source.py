import time
import tracemalloc

import pytest

from leanmill.core.errors import ConfigError
from leanmill.recipe.yaml_source import parse_scalar, parse_yaml


def refusal(text):
    with pytest.raises(ConfigError) as error:
        parse_yaml(text, "r.yaml")
    (line,) = str(error.value).splitlines()
    return line


def test_merge_keys_give_way_to_the_mapping_s_own_and_keep_their_lines():
    text = (
        "base: &base\n  steps: 1\n  sizes: {a: 1}\n"  # lines 1 to 3
        "train:\n  <<: *base\n  steps: 5\n"  # 4 to 6
        "eval:\n  <<: [*base, {steps: 7, every: 2}]\n"  # 7, 8
    )
    value, lines = parse_yaml(text, "r.yaml")
    assert value["train"] == {"steps": 5, "sizes": {"a": 1}}
    assert value["eval"] == {"steps": 1, "sizes": {"a": 1}, "every": 2}
    assert lines["train",] == 4
    assert lines["train", "steps"] == 6
    assert lines["train", "sizes"] == lines["train", "sizes", "a"] == 3
    assert lines["eval", "every"] == 8


def test_a_merged_mapping_may_merge_others_wherever_it_stands():
    value, _ = parse_yaml("a: &a {x: 1}\nb: {deep: &b {<<: *a, x: 2}}\nc: {<<: *b, y: 3}\n", "r.yaml")
    assert value["b"]["deep"] == {"x": 2}
    assert value["c"] == {"x": 2, "y": 3}


def test_aliases_are_copies():
    value, lines = parse_yaml("a: &a {x: [1]}\nb: *a\n", "r.yaml")
    assert value["a"] == value["b"]
    assert value["a"] is not value["b"]
    assert value["a"]["x"] is not value["b"]["x"]
    assert lines["b", "x"] == 1


def bomb(levels, width):
    rows = ["a0: &a0 [" + ", ".join(["x"] * width) + "]"]
    rows += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * width) + "]" for i in range(1, levels)]
    return "\n".join(rows)


@pytest.mark.parametrize("text", [bomb(8, 9), bomb(60, 2), bomb(8, 9).replace("[", "{p: [").replace("]", "]}")])
def test_an_alias_bomb_is_refused_at_once_and_in_little_memory(text):
    tracemalloc.start()
    start = time.perf_counter()
    assert "remove" in refusal(text)
    assert time.perf_counter() - start < 2
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["a: &a [*a]", "&a {b: {c: *a}}", "a: &a {<<: *a}"])
def test_an_anchor_that_holds_itself_is_refused(text):
    assert refusal(text).startswith("r.yaml line 1, column")
    assert "write the value out" in refusal(text)


@pytest.mark.parametrize("text", ["[" * 50_000, "{a: " * 50_000, "- " * 2000, "a: " + "[" * 30 + "]" * 30])
def test_deep_nesting_is_refused_in_bounded_time(text):
    start = time.perf_counter()
    assert "more than 20 levels of nesting; a recipe needs about six" in refusal(text)
    assert time.perf_counter() - start < 5
    with pytest.raises(ConfigError, match="20 levels"):
        parse_scalar(text, "a.b=...")


def test_dates_and_signs_are_text_and_keys_are_what_is_written():
    value, _ = parse_yaml("a: 2024-01-01\nb: 2024-99-99\nc: =\n1: x\non: y\n2024-01-01: z\n", "r.yaml")
    assert value == {"a": "2024-01-01", "b": "2024-99-99", "c": "=", "1": "x", "on": "y", "2024-01-01": "z"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: !!set {x}", ["line 1, column 4", "!!set is not for recipes; remove it"]),
        ("a: !!int abc", ["'abc' is no int", "correct it"]),
        ("a: !!bool perhaps", ["'perhaps' is no bool"]),
        ("a: 9223372036854775808", ["beyond 64 bits; give a smaller one"]),
        ("a: 1" + "0" * 5000, ["no int that can be read"]),
        ('a: "\\0"', ["no file can hold; remove"]),
        ('"\\ud800": 1', ["no file can hold; remove"]),
        ("a:\n  <<: 3", ["line 2", "`<<` merges a mapping"]),
        ("a: 1\n---\nb: 2", ["line 2", "more than one document; keep one"]),
        ("a: *b", ["undefined alias 'b'", "correct it there"]),
        ("x: &a {k: 1, k: 2}\ny: {<<: *a}", ["line 1", "'k' is given twice (first in line 1); keep one"]),
    ],
)
def test_what_no_recipe_holds_is_refused_with_line_and_remedy(text, parts):
    for part in parts:
        assert part in refusal(text)
