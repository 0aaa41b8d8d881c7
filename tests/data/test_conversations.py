"""Rows of every format become the same turns; what fits none or several is named."""

import json

import pytest

from leanmill.core.errors import ConfigError
from leanmill.data.build import build_tokenizer
from leanmill.data.chat import ChatRenderer
from leanmill.data.config import HfDataset, TokenizerConfig
from leanmill.data.conversations import check_messages, format_of, split_tools, turns_of
from leanmill.data.hf import open_hf
from leanmill.data.tokenizer import tokenizer_fingerprint, with_chat_template
from tests.data.samples import conversations, hf_config, sentences, write_jsonl, write_texts


TURNS = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
SYSTEM = {"role": "system", "content": "be brief"}
ROWS = {
    "messages": {"messages": [SYSTEM, *TURNS]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}], "system": "be brief"
    },
    "alpaca": {"instruction": "why", "input": "", "output": "so", "system": "be brief"},
    "prompt_completion": {"prompt": [SYSTEM, TURNS[0]], "completion": "so"},
}  # fmt: skip


def where():
    return "row 3 of a.jsonl"


def documents(path, **settings):
    return open_hf(HfDataset(path=str(path), **{"validation_fraction": 0.0, **settings}), "sft", path.parent / "cache")


@pytest.mark.parametrize("asked", ["auto", "by name"])
@pytest.mark.parametrize("name", ROWS)
def test_every_format_gives_the_same_turns(tmp_path, name, asked):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [ROWS[name]] * 2)
    read = documents(path, row_format="auto" if asked == "auto" else name)
    assert list(read.train()) == [[SYSTEM, *TURNS]] * 2


def test_alpaca_puts_the_input_below_the_instruction():
    row = {"instruction": "add", "input": "2 and 3", "output": "5"}
    assert turns_of(row, "alpaca", "messages", where)[0] == {"role": "user", "content": "add\n\n2 and 3"}


def test_a_column_of_messages_is_what_it_says():
    assert format_of(["messages", "prompt", "completion"], "messages", where) == "messages"
    assert format_of(["turns", "prompt", "completion"], "messages", where) == "prompt_completion"


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        (
            ["instruction", "output", "prompt", "completion"],
            ["alpaca and prompt_completion", "row 3 of a.jsonl", "to one"],
        ),
        (["text", "id"], ["no column 'messages'; it has id, text; set messages_field", "alpaca needs instruction and"]),
    ],
)
def test_rows_that_fit_several_formats_or_none(columns, parts):
    with pytest.raises(ConfigError) as error:
        format_of(columns, "messages", where)
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row_format", "bad", "message"),
    [
        ("messages", {"messages": [{"from": "human"}]}, "column 'messages' in row 2 of .*must be a list of"),
        ("sharegpt", {"conversations": [{"from": "narrator", "value": "x"}]}, "in row 2 of .* with from one of human"),
        ("sharegpt", {"conversations": [{"from": ["gpt"], "value": "x"}]}, "in row 2 of .* with from one of human"),
        ("sharegpt", {"conversations": 3}, "in row 2 of .* with from one of human"),
        ("sharegpt", {"conversations": [], "system": 3}, "column 'system' in row 2 of .* holds int"),
        ("alpaca", {"instruction": 3, "output": "x"}, "column 'instruction' in row 2 of .* holds int"),
        ("alpaca", {"instruction": "x", "output": "x", "system": ["y"]}, "column 'system' in row 2 of .* holds list"),
        ("messages", {"messages": [*TURNS, {"role": "user", "content": None}]}, "in row 2 of .*'role': 'user'"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "in row 2 of .* content text or a list"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": "add"}]}, "row 2 of .* has tool_calls 'add'"),
        ("messages", {"messages": [{"role": "assistant", "tool_calls": ["add"]}]}, "row 2 of .* must be a list of"),
        ("messages", {"messages": [{**TURNS[1], "tool_calls": {}}]}, "row 2 of .* has tool_calls '{}'"),
        ("prompt_completion", {"prompt": "x"}, "needs the column 'completion', and row 2 of .* has prompt"),
    ],
)
def test_wrong_rows_are_named_by_number(row_format, bad, message):
    with pytest.raises(ConfigError, match=message):
        turns_of(bad, row_format, "messages", lambda: "row 2 of a.jsonl")


def test_rows_without_a_word_are_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [ROWS["alpaca"], {"instruction": "", "input": "", "output": ""}])
    stream = documents(path).train()
    assert len(list(stream)) == 1
    assert stream.tally.describe() == "rows: 2 read, 1 without messages"


@pytest.mark.parametrize(
    ("row_format", "row", "turns"),
    [
        ("alpaca", {"instruction": "why", "input": "", "output": " "}, TURNS[:1]),
        ("alpaca", {"instruction": "", "input": "\n", "output": "so", "system": "be brief"}, []),
        ("prompt_completion", {"prompt": "why", "completion": ""}, TURNS[:1]),
        ("prompt_completion", {"prompt": " ", "completion": "so"}, []),
        ("prompt_completion", {"prompt": [], "completion": [TURNS[1]]}, []),
    ],
)
def test_half_an_exchange_has_no_answer_to_learn(tmp_path, row_format, row, turns):
    assert turns_of(row, row_format, "messages", where) == turns
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [row])
    stream = documents(path).train()
    assert list(stream) == ([turns] if turns else [])
    assert ("without messages" in stream.tally.describe()) == (not turns)


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int", "b": None}}}]
WITH_TOOLS = (
    "{% if tools %}{{ '<|system|>' + tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.a }}){% endfor %}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("marked", [True, False])
def test_tools_and_calls_go_through_the_template(tokenizer, tmp_path, tools, marked):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "2?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    write_jsonl(path, [{"messages": turns, "tools": tools}])
    (document,) = documents(path).train()
    kept, found = split_tools(document)
    assert kept[1] == {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    ]}  # fmt: skip
    assert found[0]["function"]["name"] == "add"
    template = WITH_TOOLS if marked else WITH_TOOLS.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.save_pretrained(tmp_path / "own")
    own = with_chat_template(type(tokenizer).from_pretrained(str(tmp_path / "own")), template)
    text, spans = ChatRenderer(own).render(document)
    assert text.startswith("<|system|>[")
    assert "<|user|>2?<|assistant|>add(2)" in text
    assert [text[start:end] for start, end in spans] == [f"add(2){own.eos_token}"]


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("{", "is no JSON"),
        ('{"a": 1}', "must be a list of functions"),
        ('["add"]', "must be a list of functions"),
        ([None], "must be a list of functions"),
    ],
)
def test_tools_that_are_none(tools, message):
    with pytest.raises(ConfigError, match=f"column 'tools' in row 3 of a.jsonl {message}"):
        turns_of({"messages": TURNS, "tools": tools}, "messages", "messages", where)
    for nothing in (" ", "null", "[]", [], None):
        assert turns_of({"messages": TURNS, "tools": nothing}, "messages", "messages", where) == TURNS


@pytest.mark.parametrize("tools", [3, "{", ["add"]])
def test_tools_that_came_in_the_first_turn_are_checked(tools):
    turns = turns_of({"messages": [{**TURNS[0], "tools": tools}]}, "messages", "messages", where)
    with pytest.raises(ConfigError, match="'tools' of the first turn"):
        split_tools(turns)
    assert split_tools([{**TURNS[0], "tools": json.dumps(TOOLS)}])[1][0]["type"] == "function"


@pytest.mark.parametrize("arguments", ["{a: 2", "[2]", "2"])
def test_arguments_that_are_no_mapping_stay_text(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    (turn,) = check_messages([{"role": "assistant", "content": None, "tool_calls": [call]}], where)
    assert turn["tool_calls"] == [call]


def test_a_call_needs_no_content_and_a_turn_does():
    assert check_messages([{"role": "assistant", "tool_calls": [CALL]}], where)[0]["content"] == ""
    with pytest.raises(ConfigError, match="must be a list of"):
        check_messages([{"role": "assistant"}], where)


def test_a_chat_template_of_the_recipe_is_another_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "own")
    (tmp_path / "chat.jinja").write_text(WITH_TOOLS)
    path = write_texts(tmp_path / "a.jsonl", 3)
    found = [
        build_tokenizer(
            hf_config(path, tmp_path, tokenizer=TokenizerConfig(path=str(tmp_path / "own"), chat_template=given))
        )
        for given in (None, WITH_TOOLS, str(tmp_path / "chat.jinja"))
    ]
    assert found[1].chat_template == found[2].chat_template == WITH_TOOLS
    assert tokenizer_fingerprint(found[1]) == tokenizer_fingerprint(found[2]) != tokenizer_fingerprint(found[0])
    (tmp_path / "latin.jinja").write_bytes(b"{# na\xefve #}")
    with pytest.raises(ConfigError, match=r"latin\.jinja' is not UTF-8 at byte 5"):
        with_chat_template(found[0], str(tmp_path / "latin.jinja"))
    with pytest.raises(ConfigError, match=r"'gone\.jinja' is no file that can be read \(No such file"):
        with_chat_template(found[0], "gone.jinja")


def test_a_validation_file(tmp_path):
    write_texts(tmp_path / "a.jsonl", 12)
    write_jsonl(tmp_path / "test.jsonl", [{"text": t} for t in sentences(5, start=50)])
    config = HfDataset(path=str(tmp_path / "a.jsonl"), validation_path=str(tmp_path / "test.jsonl"), streaming=True)
    read = open_hf(config, "pretrain", tmp_path / "cache")
    assert list(read.train()) == sentences(12)
    assert list(read.validation()) == sentences(5, start=50)
    write_jsonl(tmp_path / "test.jsonl", [{"text": "other"}])
    assert open_hf(config, "pretrain", tmp_path / "cache").key != read.key  # other held-out text is another cache
    of_split = config.model_copy(update={"validation_split": "test", "validation_path": str(tmp_path)})
    assert list(open_hf(of_split, "pretrain", tmp_path / "cache").validation()) == ["other"]


def test_conversations_of_before_read_as_before(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{"messages": c, "prompt": "x", "completion": "y"} for c in conversations(5)])
    assert list(documents(path).train()) == conversations(5)
