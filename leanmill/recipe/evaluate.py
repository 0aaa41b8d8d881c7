"""The root of an evaluation recipe: what models are put to, beside one another. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from leanmill.core.config import Config
from leanmill.data.config import DataConfig


class BitsPerByte(Config):
    """Held-out text of every domain of `data`, in bits a byte: comparable between tokenizers."""

    type: Literal["bits_per_byte"] = "bits_per_byte"
    """Name of the kind of task."""
    tokens_per_domain: int = Field(default=65_536, ge=1)
    """Tokens of each domain, rounded down to whole rows."""


class Completions(Config):
    """Prompts that must be continued word for word, by the likeliest token each time."""

    type: Literal["completions"]
    """Name of the kind of task."""
    name: str = "completions"
    """What the table calls it."""
    path: str
    """JSON Lines: an object a line with the fields below."""
    prompt_field: str = "prompt"
    """Text to continue, as it is."""
    answer_field: str = "answer"
    """What must follow, or a list of such texts of which one must; blanks around it do not count."""
    group_field: str = "group"
    """What an item is counted under, beside all; may be missing."""
    stops: list[str] = Field(default=["\n"], min_length=1)
    """A continuation ends before the first of these, or with the tokenizer's end-of-text."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Tokens after which a continuation that did not stop counts as it is."""
    limit: int | None = Field(default=None, ge=1)
    """Items taken from the start of the file; None is all."""


class Retrieval(Config):
    """A number hidden in a long text, asked for at its end, at depths from the start to the end.

    Mohtashami and Jaggi 2023, arXiv:2305.16300, with held-out text of `data` around the key rather than one sentence
    over and over.
    """

    type: Literal["retrieval"] = "retrieval"
    """Name of the kind of task."""
    lengths: list[Annotated[int, Field(ge=64)]] | None = Field(default=None, min_length=1)
    """Tokens of a text with its question and answer, each a group; None is a quarter, half and all of
    `data.sequence_length`."""
    num_texts: int = Field(default=32, ge=1)
    """Texts of each length, their keys evenly spread over depths."""
    num_digits: int = Field(default=5, ge=1, le=18)
    """Of a key."""


class LmEval(Config):
    """Tasks of the LM Evaluation Harness (`pip install 'leanmill[harness]'`), which fetches their data itself."""

    type: Literal["lm_eval"]
    """Name of the kind of task."""
    tasks: list[str] = Field(min_length=1)
    """Names of tasks or groups, as `lm-eval ls tasks` lists them."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Solved examples before each question; None is each task's own number."""
    limit: int | None = Field(default=None, ge=1)
    """Questions of each task; None is all."""
    include_path: str | None = None
    """Folder with tasks of your own (YAML)."""


class Speculative(Config):
    """The model as a draft of a larger one: how many of the tokens that it proposes the other accepts.

    Speculative decoding of Leviathan et al. 2023, arXiv:2211.17192, as transformers does it, on held-out text.
    """

    type: Literal["speculative"]
    """Name of the kind of task."""
    target: str = Field(min_length=1)
    """The model that accepts: a run, a checkpoint or a Hugging Face folder, with the draft's tokenizer."""
    num_prompts: int = Field(default=32, ge=1)
    """Texts that are continued."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of each that are given."""
    new_tokens: int = Field(default=64, ge=1)
    """Tokens that are added; where a text ends the next begins."""
    num_proposed: int = Field(default=4, ge=1)
    """Tokens that the draft proposes at once."""
    temperature: float = Field(default=1.0, ge=0)
    """Of both models; 0 takes the likeliest token."""


EvaluationTask = Annotated[BitsPerByte | Completions | Retrieval | Speculative | LmEval, Field(discriminator="type")]


def _offline_tasks() -> list[BitsPerByte | Completions | Retrieval | Speculative | LmEval]:
    return [BitsPerByte(), Retrieval()]


class EvaluateRecipe(Config):
    """What `leanmill evaluate` puts models to."""

    seed: int = Field(default=0, ge=0)
    """Of what tasks draw."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` is cuda where there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """What models compute in; one precision for all of them, so that they differ in their weights alone. `auto` is bf16
    where the device multiplies it natively."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Text that nothing was trained on, if models were trained on this section; each model brings its tokenizer."""
    rows_per_batch: int = Field(default=8, ge=1)
    """Rows of one forward."""
    weights_gib: float | None = Field(default=None, gt=0)
    """The most of a model's weights that is held, GiB, for models larger than memory: the others are read from the
    folder whenever a layer is called. Of Hugging Face folders; None holds all."""
    tasks: list[EvaluationTask] = Field(default_factory=_offline_tasks, min_length=1)
    """Tasks, each `{type: name, ...}`."""
