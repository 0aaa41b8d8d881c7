"""Chat templates: the text of a conversation and which of its characters are the answers."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from leanmill.core.errors import ConfigError
from leanmill.data.conversations import split_tools
from leanmill.data.hub import one_line


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""First character of an answer and the one after its last."""


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template.

    Where a conversation's template marks answers with `{% generation %}`, those marks are used. Elsewhere an
    answer is what the template adds, after its generation prompt, when the turn is appended; that
    is exact as long as rendering the first turns gives the beginning of rendering all of them,
    which is checked for every conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                "data.task: sft needs a tokenizer with a chat template, and this one has none; use the tokenizer of an "
                "instruction-tuned model, or leave data.tokenizer.path out to train one with a template"
            )
        self._tokenizer = tokenizer

    def render(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """Return the text of a conversation, its tools given to the template, and the character spans of its answers.

        Raises:
            ConfigError: The template refuses the conversation, or its answers cannot be located.
        """
        messages, tools = split_tools(messages)
        template = self._template(tools)
        return self._marked(messages, tools, template) if _has_marks(template) else self._by_prefix(messages, tools)

    def prompt(self, text: str) -> str:
        """Return the beginning of a conversation in which a user says `text`, up to the answer.

        Raises:
            ConfigError: The template refuses it.
        """
        return self._text([{"role": "user", "content": text}], None, add_generation_prompt=True)

    def _marked(self, messages: list[dict[str, Any]], tools: list[Any] | None, template: str) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            special_tokens: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                tools=tools,
                return_assistant_tokens_mask=True,
                **special_tokens,
            )
        except Exception as error:
            raise _refused(error) from error
        texts, spans = rendered
        return texts[0], [(int(start), int(end)) for start, end in spans[0]]

    def _template(self, tools: list[Any] | None) -> str:
        """The template: a tokenizer may have one of its own for conversations with tools."""
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:
            raise _refused(error) from error

    def _by_prefix(self, messages: list[dict[str, Any]], tools: list[Any] | None) -> tuple[str, list[Span]]:
        text = self._text(messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._text(messages[:index], tools, add_generation_prompt=True)
            through = self._text(messages[: index + 1], tools)
            if not (text.startswith(through) and through.startswith(before) and len(through) > len(before)):
                raise ConfigError(
                    "the chat template rewrites earlier turns, so the answers cannot be located; mark them in the "
                    "template with {% generation %}...{% endgeneration %}, or keep one answer a conversation"
                )
            spans.append((len(before), len(through)))
        return text, spans

    def _text(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, *, add_generation_prompt: bool = False
    ) -> str:
        if not messages and not add_generation_prompt:
            return ""
        try:
            return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:
            raise _refused(error) from error


@lru_cache(maxsize=8)
def _has_marks(template: str) -> bool:
    return bool(_GENERATION_TAG.search(template))


def _refused(error: Exception) -> ConfigError:
    return ConfigError(f"the chat template refuses a conversation: {one_line(error)}; correct the turns")
