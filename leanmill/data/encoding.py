"""Documents to tokens: which ids a document has, and which of them are to be predicted."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from leanmill.core.errors import ConfigError
from leanmill.data.chat import ChatRenderer, Span
from leanmill.data.config import ENCODER_TASKS, Task
from leanmill.data.conversations import Turns
from leanmill.data.pairs import Pair
from leanmill.data.sentences import SentencePair


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


Document = str | list[dict[str, Any]] | Pair | SentencePair
"""Text (pretraining), the turns of a conversation (SFT), its tools in the first, see `conversations`, or a pair."""

_BATCH_CHARS = 1_000_000


@dataclass(frozen=True)
class Encoded:
    """A document as tokens."""

    ids: NDArray[np.int64]
    """[N], the end-of-text token included."""
    is_target: NDArray[np.bool_] | None
    """[N], which tokens may be predicted; None means all of them."""
    piece_lengths: tuple[int, ...] = ()
    """Tokens of each conversation or text of a pair, one behind the other; else empty."""
    score: float = math.nan
    """How alike the two texts of a sentence pair are; NaN where that is not said."""


@dataclass(frozen=True)
class Measured:
    """A document as tokens, with the bytes each token stands for."""

    encoded: Encoded
    num_bytes: NDArray[np.int64]
    """[N], UTF-8 bytes of `text` that the token adds; special tokens added by us add none."""
    text: NDArray[np.uint8]
    """The bytes; sum(num_bytes) of them."""


class BadDocument(ConfigError):
    """A document that cannot be encoded; whoever read it knows which row it is."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index
        """Which of the documents that were given."""


class Encoder:
    """Turns documents of one task into tokens with one tokenizer.

    Args:
        tokenizer: A fast one.
        task: What documents are.
        num_pieces: Conversations that a pair becomes: 2, or 3 with a mismatched answer; of sentence pairs 2 texts and
            as many negatives as there are to be.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, task: Task, *, num_pieces: int = 1) -> None:
        from tokenizers import Tokenizer

        self.task, self.num_pieces = task, num_pieces
        # Copies: padding, truncation and special-token handling are switches on the object itself.
        self._backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        # Text that mentions <|endoftext|> must not end a document, so in plain text it is only text.
        is_text = task not in ("sft", "preference")
        self._backend.encode_special_tokens = is_text
        self._special = np.asarray(sorted(tokenizer.all_special_ids), dtype=np.int64)
        self._bos, self._eos = _frame(tokenizer, task)
        self.has_targets = not is_text
        """Whether documents say which of their tokens may be predicted."""
        self.names_rows = self.has_targets or num_pieces > 1
        """Whether what a document became is kept with the number of its row: one that does not fit is named by it."""
        self._chat = None if is_text else ChatRenderer(tokenizer)

    def encode(self, documents: Sequence[Document], before: Document | None = None) -> list[Encoded]:
        """Encode documents on all cores.

        Args:
            documents: To encode.
            before: The one ahead of them, if any: whose answer a single pair gets as its mismatched one.

        Raises:
            BadDocument: The chat template refuses one.
        """
        if self.task == "sentence_pairs":
            return self._encode_sentences([document for document in documents if isinstance(document, SentencePair)])
        if self._chat is None:
            encodings = self._backend.encode_batch_fast(list(documents), add_special_tokens=False)
            return [Encoded(self._framed(encoding.ids), None) for encoding in encodings]
        if self.task == "preference":
            pairs = [document for document in documents if isinstance(document, Pair)]
            return self._encode_pairs(pairs, before if isinstance(before, Pair) else None)
        return self._encode_rendered([self._render(document, index) for index, document in enumerate(documents)])

    def _encode_sentences(self, pairs: Sequence[SentencePair]) -> list[Encoded]:
        texts = [text for pair in pairs for text in pair.texts[: self.num_pieces]]
        framed = (self._framed(one.ids) for one in self._backend.encode_batch_fast(texts, add_special_tokens=False))
        found: list[Encoded] = []
        for pair in pairs:
            ids = [next(framed) for _ in pair.texts[: self.num_pieces]]
            lengths = [len(one) for one in ids] + [0] * (self.num_pieces - len(ids))
            score = math.nan if pair.score is None else pair.score
            found.append(Encoded(np.concatenate(ids), None, tuple(lengths), score))
        return found

    def _encode_rendered(self, rendered: list[tuple[str, list[Span]]]) -> list[Encoded]:
        encodings = self._backend.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            Encoded(ids, self._targets(ids, offsets, spans, text))
            for (text, spans), (ids, offsets) in zip(rendered, map(_arrays, encodings), strict=True)
        ]

    def _encode_pairs(self, pairs: Sequence[Pair], before: Pair | None) -> list[Encoded]:
        others = _mismatched(pairs, before) if self.num_pieces == 3 else [None] * len(pairs)
        rendered = [
            self._render_answer(turns, num_answers, index)
            for index, (pair, other) in enumerate(zip(pairs, others, strict=True))
            for turns, num_answers in pair.conversations(other)
        ]
        pieces = self._encode_rendered(rendered)
        return [_joined(pieces[start : start + self.num_pieces]) for start in range(0, len(pieces), self.num_pieces)]

    def prompt(self, text: str) -> NDArray[np.int64]:
        """Return the tokens that a model is to continue, [N], at least one.

        They are `text`, or, of conversations, all up to the answer to a user who says it.

        Raises:
            ConfigError: The chat template refuses it.
        """
        rendered = text if self._chat is None else self._chat.prompt(text)
        ids = self._backend.encode(rendered, add_special_tokens=False).ids
        return np.asarray([*(self._bos if self._chat is None else []), *ids] or [self._eos], dtype=np.int64)

    def measure(self, document: Document) -> Measured:
        """Encode one document and count the bytes of each token; of a pair the chosen conversation."""
        if isinstance(document, Pair):
            text, spans = self._render_answer(*document.conversations()[0])
        else:
            text, spans = self._render(document)
        ids, offsets = _arrays(self._backend.encode(text, add_special_tokens=False))
        content = np.frombuffer(text.encode(), dtype=np.uint8)
        num_bytes = _bytes_per_token(text, len(content), offsets)
        if self._chat is None:
            none = np.zeros(1, dtype=np.int64)
            num_bytes = np.concatenate([none[: len(self._bos)], num_bytes, none])
            return Measured(Encoded(self._framed(ids), None), num_bytes, content)
        # Markers of a template are not text: they cost nats but stand for no bytes.
        is_text = ~np.isin(ids, self._special)
        content = content[np.repeat(is_text, num_bytes)]
        return Measured(Encoded(ids, self._targets(ids, offsets, spans, text)), num_bytes * is_text, content)

    def _render(self, document: Document, index: int = 0) -> tuple[str, list[Span]]:
        if isinstance(document, str):
            return document, []
        assert self._chat is not None
        assert not isinstance(document, Pair | SentencePair)
        try:
            return self._chat.render(document)
        except ConfigError as error:
            raise BadDocument(str(error), index) from error

    def _render_answer(self, turns: Turns, num_answers: int, index: int = 0) -> tuple[str, list[Span]]:
        """Render a conversation of a pair, whose earlier answers are a part of the prompt."""
        text, spans = self._render(turns, index)
        return text, spans[-num_answers:]

    def _framed(self, ids: Any) -> NDArray[np.int64]:
        return np.asarray([*self._bos, *ids, self._eos], dtype=np.int64)

    def _targets(
        self, ids: NDArray[np.int64], offsets: NDArray[np.int64], spans: list[Span], text: str
    ) -> NDArray[np.bool_]:
        is_target = np.zeros(len(ids), dtype=np.bool_)
        for start, end in spans:
            inside = (offsets[:, 1] > start) & (offsets[:, 0] < end) & (offsets[:, 1] > offsets[:, 0])
            inside[_trailing_blanks(ids, offsets, inside, self._special, text)] = False
            is_target |= inside
        is_target[:1] = False  # nothing comes before the first token that could predict it
        return is_target


def _mismatched(pairs: Sequence[Pair], before: Pair | None) -> list[Turns]:
    """Return an answer of another pair for each: of the next one, in a circle; of a single one that `before` it."""
    if len(pairs) == 1 and before is not None:
        return [before.chosen]
    return [pair.chosen for pair in (*pairs[1:], *pairs[:1])]


def _joined(pieces: Sequence[Encoded]) -> Encoded:
    targets = [piece.is_target for piece in pieces if piece.is_target is not None]
    lengths = tuple(len(piece.ids) for piece in pieces)
    return Encoded(np.concatenate([piece.ids for piece in pieces]), np.concatenate(targets), lengths)


def _arrays(encoding: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids [N] and character spans [N, 2] of a `tokenizers.Encoding`."""
    return np.asarray(encoding.ids, dtype=np.int64), np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)


def _frame(tokenizer: PreTrainedTokenizerFast, task: Task) -> tuple[list[int], int]:
    """Return what stands before a text, and the token behind it."""
    if task in ENCODER_TASKS:
        return [int(tokenizer.cls_token_id)], int(tokenizer.sep_token_id)
    return _leading_bos(tokenizer), int(tokenizer.eos_token_id)


def _leading_bos(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def _bytes_per_token(text: str, num_bytes: int, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes up to the end of each token less those up to the token before: they sum to the text."""
    if len(offsets) == 0:
        return np.zeros(0, dtype=np.int64)
    ends = offsets[:, 1]
    if num_bytes != len(text):
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
        ends = np.concatenate([[0], np.cumsum(widths)])[ends]
    ends = np.maximum.accumulate(ends)
    ends[-1] = num_bytes
    return np.diff(ends, prepend=0)


def _trailing_blanks(
    ids: NDArray[np.int64],
    offsets: NDArray[np.int64],
    inside: NDArray[np.bool_],
    special: NDArray[np.int64],
    text: str,
) -> NDArray[np.int64]:
    """Blanks that a template writes after the closing token: layout, not answer."""
    tokens = np.flatnonzero(inside)
    closing = tokens[np.isin(ids[tokens], special)]
    if len(closing) == 0 or closing[-1] == tokens[-1]:
        return tokens[:0]
    after = tokens[tokens > closing[-1]]
    return after if not text[offsets[after[0], 0] : offsets[after[-1], 1]].strip() else tokens[:0]


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Pair | SentencePair) else str(value)


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches worth encoding at once."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += num_chars(document)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def num_chars(document: Document) -> int:
    """Characters of text in a document, roughly for conversations."""
    if isinstance(document, str):
        return len(document)
    if isinstance(document, SentencePair):
        return sum(map(len, document.texts))
    turns = document.prompt + document.chosen + document.rejected if isinstance(document, Pair) else document
    return sum(len(str(turn.get("content", ""))) for turn in turns)


def document_digest(document: Document) -> bytes:
    """Hash of a document's content, 16 bytes: what decides whether it is held out."""
    text = document if isinstance(document, str) else json.dumps(document, sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode("utf-8", errors="surrogatepass"), digest_size=16).digest()
