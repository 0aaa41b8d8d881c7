"""Which tokens of a conversation are answers, token by token."""

import numpy as np
import pytest

from leanmill.core.errors import ConfigError
from leanmill.data.chat import ChatRenderer
from leanmill.data.encoding import Encoder
from tests.data.samples import conversations


TWO_TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "naïve £"},
    {"role": "user", "content": "so?"},
    {"role": "assistant", "content": "yes"},
]
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] != 'assistant' or loop.last %}{{ '<|user|>' + m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def with_template(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    own = type(tokenizer).from_pretrained(str(tmp_path))

    def change(template):
        own.chat_template = template
        return own

    return change


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_built_in_template_token_by_token(tokenizer):
    encoded = Encoder(tokenizer, "sft").encode([TWO_TURNS])[0]
    expected = [
        ("<|system|>", False),
        ("be brief", False),
        ("<|user|>", False),
        ("why?", False),
        ("<|assistant|>", False),
        ("naïve £", True),
        ("<|endoftext|>", True),
        ("<|user|>", False),
        ("so?", False),
        ("<|assistant|>", False),
        ("yes", True),
        ("<|endoftext|>", True),
    ]
    pieces = [(token, answer) for text, answer in expected for token in ids_of(tokenizer, text)]
    assert encoded.ids.tolist() == [token for token, _ in pieces]
    assert encoded.is_target.tolist() == [answer for _, answer in pieces]


@pytest.mark.parametrize("messages", conversations(6))
def test_marks_agree_with_transformers(tokenizer, messages):
    encoded = Encoder(tokenizer, "sft").encode([messages])[0]
    reference = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids.tolist() == reference["input_ids"]
    assert encoded.is_target.tolist() == [bool(m) for m in reference["assistant_masks"]]


def test_template_without_marks_by_prefix(with_template):
    tokenizer = with_template(CHATML)
    encoded = Encoder(tokenizer, "sft").encode([TWO_TURNS])[0]
    text = "".join(tokenizer.decode([t]) for t in encoded.ids[encoded.is_target]).encode(errors="replace").decode()
    # The answers and their closing tokens; not the line feed that the template writes after each.
    decoded = tokenizer.decode(encoded.ids[encoded.is_target])
    assert decoded == "naïve £<|endoftext|>yes<|endoftext|>", text


def test_marks_and_prefixes_find_the_same_answers(tokenizer, with_template):
    marked = Encoder(tokenizer, "sft").encode([TWO_TURNS])[0]
    plain = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    by_prefix = Encoder(with_template(plain), "sft").encode([TWO_TURNS])[0]
    assert np.array_equal(marked.ids, by_prefix.ids)
    assert np.array_equal(marked.is_target, by_prefix.is_target)


def test_template_that_rewrites_turns_is_refused(with_template):
    with pytest.raises(ConfigError, match=r"rewrites earlier turns.*generation"):
        ChatRenderer(with_template(FORGETFUL)).render(TWO_TURNS)


def test_no_template_is_refused(with_template):
    with pytest.raises(ConfigError, match="needs a tokenizer with a chat template"):
        ChatRenderer(with_template(None))


def test_unknown_role_is_one_line(tokenizer):
    with pytest.raises(ConfigError, match="unknown role tool"):
        ChatRenderer(tokenizer).render([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("marked", ["default", "tool_use"])
def test_the_template_for_tools_decides_how_its_answers_are_found(tokenizer, with_template, marked):
    plain = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    # In the marked template the closing token is no answer, so that marks and prefixes differ.
    content = "{% generation %}{{ message['content'] }}{% endgeneration %}"
    short = plain.replace("{{ message['content'] + eos_token }}", content + "{{ eos_token }}")
    assert short != plain
    renderer = ChatRenderer(with_template({"default": plain, "tool_use": plain, marked: short}))
    with_tools = [{**TWO_TURNS[0], "tools": [{"name": "add"}]}, *TWO_TURNS[1:]]
    answers = []
    for messages in (TWO_TURNS, with_tools):
        text, spans = renderer.render(messages)
        answers.append([text[start:end] for start, end in spans])
    by_marks, by_prefix = answers if marked == "default" else answers[::-1]
    assert by_marks == ["naïve £", "yes"]
    assert by_prefix == ["naïve £<|endoftext|>", "yes<|endoftext|>"]


def test_several_templates_of_which_none_is_the_default_is_one_line(with_template):
    with pytest.raises(ConfigError, match="multiple chat templates"):
        ChatRenderer(with_template({"tool_use": CHATML})).render(TWO_TURNS)
