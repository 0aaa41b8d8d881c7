"""Where tokens come from. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from leanmill.core.config import Config


Task = Literal["pretrain", "sft", "preference", "masked", "sentence_pairs"]
ENCODER_TASKS: frozenset[Task] = frozenset({"masked", "sentence_pairs"})
"""Those whose text is framed as encoders know it, `[CLS] text [SEP]`."""


class TokenizerConfig(Config):
    """A tokenizer: from Hugging Face (`path`), or byte-level BPE trained once and cached."""

    path: str | None = None
    """Local folder or hub name; None trains byte-level BPE on the data."""
    trust_remote_code: bool = False
    """Run Python code that comes with `path`."""
    chat_template: str | None = None
    """Jinja chat template that replaces the tokenizer's own: its text, or a file with it; `{% generation %}` marks
    what is to be learned. None keeps the tokenizer's."""
    vocab_size: int = Field(default=8192, ge=260)
    """Vocabulary of a trained tokenizer: 256 bytes, 4 special tokens, the rest learned."""
    num_training_bytes: int = Field(default=16_000_000, ge=1)
    """Text a trained tokenizer is fitted on, bytes."""


class LocalCorpus(Config):
    """Real text every machine with the dependencies has, in domains `python`, `cpp`, `english`."""

    type: Literal["local_corpus"] = "local_corpus"
    domains: dict[Literal["python", "cpp", "english"], Annotated[float, Field(ge=0)]] = Field(
        default={"python": 1.0, "cpp": 0.25, "english": 0.25}, min_length=1
    )
    """Sampling weight of each domain, relative."""
    max_bytes: int | None = Field(default=32_000_000, ge=1)
    """Training text read of the domain with the largest weight, bytes; the others get their share,
    so that all are repeated equally often. None reads all."""
    validation_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of files held out, by file hash."""

    @model_validator(mode="after")
    def _check_domains(self) -> Self:
        if not any(self.domains.values()):
            raise ValueError("domains: every weight is 0; give at least one domain a weight above 0")
        return self


class HfDataset(Config):
    """A Hugging Face dataset: hub name, or local JSONL / Parquet / Arrow / text files."""

    type: Literal["hf"] = "hf"
    name: str = "data"
    """Name of the domain in reports."""
    path: str
    """Hub name, file, folder or glob of local files."""
    subset: str | None = None
    """Hub configuration name."""
    split: str = "train"
    """Split to train on."""
    validation_split: str | None = None
    """Split to evaluate on; None holds `validation_fraction` of the rows out by row hash."""
    validation_path: str | None = None
    """File, folder or glob of local files to evaluate on, of the split `validation_split` where that is given;
    nothing is held out of `path` then."""
    validation_fraction: float = Field(default=0.01, ge=0, lt=1)
    """Share of rows held out where there is no validation split, at least one. A text file is one row; of a single
    file, this share at its end is held out."""
    format: Literal["auto", "json", "parquet", "arrow", "text"] = "auto"
    """Format of local files; `auto` goes by the ending."""
    streaming: bool = False
    """Read as a stream instead of tokenising the whole set once; every rank then tokenises everything."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Rows of a stream that are shuffled together; rows further apart stay in order."""
    text_field: str = "text"
    """Column with the text (pretraining)."""
    row_format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    """How rows hold conversations (SFT): turns of {role, content}; `conversations` of {from, value}; `instruction`,
    `input` and `output`; `prompt` and `completion`. `auto` takes `messages_field` where a row has it, else what its
    columns fit. A column `tools` goes to the chat template."""
    messages_field: str = "messages"
    """Column with the chat turns, a list of {role, content} (SFT)."""
    first_field: str | None = None
    """Column with the first text of a sentence pair; None finds that and the second one by their names."""
    second_field: str | None = None
    """Column with the second text; None finds `anchor` and `positive`, `query` and `positive`,
    `sentence1` and `sentence2`, `question` and `answer`, or `query` and `answer`."""
    negatives_field: str = "negatives"
    """Column with texts that do not fit the first one, a list or a single text; rows may lack it."""
    score_field: str = "score"
    """Column with how alike the two texts are, a number; rows may lack it."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight inside a mixture, relative."""

    @property
    def holds_out(self) -> bool:
        """Whether rows of `split` are kept for evaluation."""
        return self.validation_split is None and self.validation_path is None and self.validation_fraction > 0

    def of_validation(self) -> HfDataset:
        """The source that `validation_path` names, read as this one is."""
        changes = {"path": self.validation_path, "validation_path": None, "validation_fraction": 0.0}
        split = {"split": self.validation_split or "train", "validation_split": None}
        return self.model_copy(update={**changes, **split, "streaming": False})


class Prepared(Config):
    """A folder that `leanmill data prepare` wrote: tokens, held-out text and the tokenizer."""

    type: Literal["prepared"] = "prepared"
    path: str
    """The folder; without `data.tokenizer.path` its tokenizer is the run's."""
    weight: float = Field(default=1.0, gt=0)
    """Multiplies the sampling weights of its domains."""
    scores: str | None = None
    """Folder that `leanmill data score` wrote of this text; only the best documents of each domain are trained on."""
    kept_share: float | None = Field(default=None, gt=0, le=1)
    """Share of a domain's tokens that its best documents have together, with `scores`; None is then 0.5."""

    @model_validator(mode="after")
    def _check_scores(self) -> Self:
        if self.kept_share is not None and self.scores is None:
            raise ValueError(
                "kept_share: it chooses documents by their scores; give scores, the folder of `leanmill data score`, "
                "or remove it"
            )
        return self


Source = LocalCorpus | HfDataset | Prepared


class Mixture(Config):
    """A weighted mixture of sources; a row comes whole from one source."""

    type: Literal["mixture"] = "mixture"
    sources: list[Annotated[Source, Field(discriminator="type")]] = Field(min_length=1)
    """The sources; `weight` of each is relative (a local corpus brings its domains' weights)."""


class MaskingConfig(Config):
    """Which tokens are hidden from an encoder (Devlin et al. 2018, arXiv:1810.04805), drawn anew in every pass.

    What a token becomes depends on `seed`, the number of its row and its place in it alone.
    """

    share: float = Field(default=0.15, gt=0, lt=1)
    """Share of tokens to predict; special tokens and padding never are."""
    as_mask: float = Field(default=0.8, ge=0, le=1)
    """Of those, the share that the mask token takes the place of."""
    as_random: float = Field(default=0.1, ge=0, le=1)
    """Of those, the share that a random token takes the place of; the rest stay as they are."""

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.as_mask + self.as_random > 1:
            raise ValueError(
                f"as_mask={self.as_mask:g} and as_random={self.as_random:g} are more than 1 together; give shares of "
                f"the tokens to predict, e.g. 0.8 and 0.1"
            )
        return self


class SubsetConfig(Config):
    """A share of the rows a round, in the place of all of them an epoch.

    Rounds that draw anew are RS2, repeated sampling of random subsets (Okanovic et al. 2023, arXiv:2305.18424); one
    that stays is random data pruning, which with a teacher loses little (Ben-Baruch et al. 2024, arXiv:2403.07854).
    `train.epochs` counts rounds.
    """

    share: float = Field(gt=0, lt=1)
    """Of the rows of each source, rounded down to whole rows, at least one."""
    draw: Literal["without_replacement", "with_replacement", "once"] = "without_replacement"
    """`without_replacement`: rows come again only once all had their turn, so that rounds cut passes into pieces.
    `with_replacement`: each round draws from all rows. `once`: the first round's rows, in another order each round."""


class DataConfig(Config):
    """Everything between files and token rows."""

    source: Annotated[LocalCorpus | HfDataset | Prepared | Mixture, Field(discriminator="type")] = Field(
        default_factory=LocalCorpus
    )
    """Where text comes from."""
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    """How text becomes tokens."""
    task: Task = "pretrain"
    """`pretrain` packs documents and predicts every token; `sft` applies the chat template and
    predicts the answers only; `preference` reads pairs of answers (`prompt`, `chosen`, `rejected`) for techniques that
    compare them, and keeps a pair in one row. `masked` packs documents and hides tokens, for encoders (`model.task:
    masked_lm`). `sentence_pairs` reads two texts that belong together, for `model.task: embedding`: a row holds both,
    and hard negatives, side by side, each padded to its share of `sequence_length`."""
    num_negatives: int = Field(default=0, ge=0)
    """Hard negatives that are read of each sentence pair, the first ones; a row with fewer is filled with none."""
    masking: MaskingConfig = Field(default_factory=MaskingConfig)
    """Which tokens `masked` hides."""
    mismatched_answers: bool = False
    """With each pair also the chosen answer of another pair to its prompt, which `kto` measures its zero with."""
    sequence_length: int = Field(default=1024, ge=2)
    """Tokens of a row."""
    subset: SubsetConfig | None = None
    """Train on a share of the rows a round; None is all of them."""
    document_mask: bool = True
    """No token attends across documents of a packed row."""
    long_documents: Literal["split", "truncate", "error"] | None = None
    """What happens to a document longer than a row. `split` joins documents and cuts them at row ends, so
    nothing is padded; with `truncate` and `error` every document stays whole in one row. None is
    `split` for `pretrain` and `masked`, and `error` for `sft`, which never cuts a conversation from its answers."""
    cache_dir: str | None = None
    """Where tokenised data and trained tokenizers are cached; None is `~/.cache/leanmill`, or a
    temporary folder where that cannot be written."""

    @property
    def is_plain_text(self) -> bool:
        """Whether documents are texts, rather than conversations."""
        return self.task in ("pretrain", "masked")

    @property
    def trained_vocab_size(self) -> int | None:
        """Vocabulary of the tokenizer that is trained on the data; None where one is named or lies in prepared data."""
        is_there = self.tokenizer.path is not None or any(isinstance(one, Prepared) for one in sources_of(self))
        return None if is_there else self.tokenizer.vocab_size

    @property
    def text_length(self) -> int:
        """The most tokens that a text has: of sentence pairs its share of a row."""
        return self.sequence_length // self.num_pieces if self.task == "sentence_pairs" else self.sequence_length

    @property
    def long_document_rule(self) -> Literal["split", "truncate", "error"]:
        """`long_documents`, with None resolved."""
        return self.long_documents or ("split" if self.is_plain_text else "error")

    @property
    def num_pieces(self) -> int:
        """Texts or conversations that a document is, each of which attends to itself only: of pairs several."""
        if self.task == "sentence_pairs":
            return 2 + self.num_negatives
        return 1 if self.task != "preference" else 3 if self.mismatched_answers else 2

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.task != "preference":
            if self.mismatched_answers:
                raise ValueError("mismatched_answers: they are of pairs; set task: preference, or remove it")
            return self
        if self.long_documents not in (None, "error"):
            raise ValueError(
                f"long_documents: {self.long_documents} would cut an answer of a pair; remove it with task: preference"
            )
        if not self.document_mask:
            raise ValueError(
                "document_mask: false lets an answer of a pair see the other; remove it with task: preference"
            )
        return self

    @model_validator(mode="after")
    def _check_sentences(self) -> Self:
        if self.task != "sentence_pairs":
            if self.num_negatives:
                raise ValueError("num_negatives: they are of sentence pairs; set task: sentence_pairs, or remove it")
            return self
        if self.long_documents == "split":
            raise ValueError(
                "long_documents: split would make two texts of one; set truncate or error with task: sentence_pairs"
            )
        if self.sequence_length % self.num_pieces or self.sequence_length < 4 * self.num_pieces:
            below = self.sequence_length // self.num_pieces * self.num_pieces
            fitting = max(below, 4 * self.num_pieces)
            raise ValueError(
                f"sequence_length: {self.sequence_length} is shared by the {self.num_pieces} texts of a row in equal "
                f"parts of 4 tokens or more; give a multiple of {self.num_pieces}, e.g. {fitting}"
            )
        return self

    @model_validator(mode="after")
    def _check_long_documents(self) -> Self:
        if self.task == "sft" and self.long_documents == "split":
            raise ValueError(
                "long_documents: split would cut a conversation from its answer; set truncate or error with task: sft"
            )
        return self


def sources_of(config: DataConfig) -> list[Source]:
    """Return the sources of a `data` section, in the order of the recipe."""
    return list(config.source.sources) if isinstance(config.source, Mixture) else [config.source]
