"""What must hold between the sections of a recipe. Pure arithmetic on the parsed values; imports no torch.

Each rule yields one line: what was given, what is allowed, what to type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_multiples
from leanmill.core.secrets import find_secrets, shown
from leanmill.data.config import HfDataset, LocalCorpus, sources_of
from leanmill.recipe.layout_rules import layout_problems
from leanmill.recipe.model_task_rules import model_task_problems
from leanmill.recipe.technique_rules import technique_problems


if TYPE_CHECKING:
    from leanmill.recipe.sections import Sections


AnyRecipe = TypeVar("AnyRecipe", bound="Sections")
LENGTHS = ("epochs", "total_tokens", "steps")
"""Keys of `train` that each say how long a run is; one of them is given."""
_MAX_NAME_BYTES = 200
"""File systems take 255 bytes, and runs add endings."""


def problems(recipe: Sections) -> Iterator[str]:
    """Yield every contradiction between sections, in the order a reader meets them."""
    yield from _names(recipe)
    yield from _batch(recipe)
    yield from _length(recipe)
    yield from _context(recipe)
    yield from _frozen(recipe)
    yield from _attention(recipe)
    yield from _data(recipe)
    yield from model_task_problems(recipe)
    yield from technique_problems(recipe)
    yield from _schedules(recipe)
    yield from _rewinds(recipe)
    yield from layout_problems(recipe)
    yield from _secrets(recipe)


def _attention(recipe: Sections) -> Iterator[str]:
    if recipe.model.attention == "per_document" and recipe.train.compile:
        yield (
            "model.attention=per_document has other documents in every batch, and train.compile=true would compile "
            "blocks for each; set model.attention=auto, or train.compile=false"
        )


def _rewinds(recipe: Sections) -> Iterator[str]:
    """Going back needs something to go back to."""
    train, checkpoint = recipe.train, recipe.checkpoint
    asked = [
        *(["train.non_finite=rewind"] if train.non_finite == "rewind" else []),
        *(["train.spike.action=rewind"] if train.spike is not None and train.spike.action == "rewind" else []),
    ]
    if asked and checkpoint.every_steps is None and not checkpoint.keep_steps:
        yield (
            f"{' and '.join(asked)}: the run goes back to a checkpoint, and none is written before its end; set "
            f"checkpoint.every_steps"
        )


def micro_batches_of_step(recipe: Sections, data_size: int) -> int:
    """Return the micro-batches of an optimizer step on one rank.

    Args:
        recipe: The recipe.
        data_size: Ranks that read different data.

    Raises:
        ConfigError: The batch does not divide over the ranks.
    """
    batch = recipe.batch
    share = batch.tokens_per_micro_batch * data_size
    if batch.tokens_per_step % share:
        raise ConfigError(
            f"batch.tokens_per_step={batch.tokens_per_step} is no multiple of tokens_per_micro_batch="
            f"{batch.tokens_per_micro_batch} x {data_size} data ranks = {share}; set batch.tokens_per_step="
            f"{near_multiples(batch.tokens_per_step, share)}, or a smaller tokens_per_micro_batch"
        )
    return batch.tokens_per_step // share


def known_steps(recipe: Sections) -> int | None:
    """Optimizer steps of the run; None where only its data tells."""
    return None if recipe.train.epochs is not None else num_steps(recipe)


def with_length_in_tokens(recipe: AnyRecipe, rows_per_epoch: int | None) -> AnyRecipe:
    """Return the recipe with `train.epochs` replaced by the tokens that they are.

    Args:
        recipe: The recipe.
        rows_per_epoch: Rows of one pass over its training data; None where only reading would tell.

    Raises:
        ConfigError: A technique's schedule does not fit a run of that length.
    """
    if recipe.train.epochs is None:
        return recipe
    assert rows_per_epoch is not None, "a stream with epochs is refused at parse time"
    tokens = math.ceil(recipe.train.epochs * rows_per_epoch) * recipe.data.sequence_length
    train = recipe.train.model_copy(update={"epochs": None, "total_tokens": tokens})
    resolved = recipe.model_copy(update={"train": train})
    if found := list(_schedules(resolved)):  # what could not be said before
        raise ConfigError("\n".join(found))
    return resolved


def num_steps(recipe: Sections, *, step: int = 0, tokens: int = 0) -> int:
    """Optimizer steps of the run.

    Args:
        recipe: The recipe, its length not in epochs.
        step: Steps that a resumed run has done, perhaps with another `batch.tokens_per_step`.
        tokens: Tokens it has consumed in them; a length in tokens counts what is left of it.
    """
    if recipe.train.steps is not None:
        return recipe.train.steps
    left = max(0, (recipe.train.total_tokens or 0) - tokens)
    return step + math.ceil(left / recipe.batch.tokens_per_step)


def _names(recipe: Sections) -> Iterator[str]:
    if not recipe.name.strip() or "/" in recipe.name or recipe.name in (".", ".."):
        yield f"name={recipe.name!r} must be one non-empty folder name, since it fills run_dir; type e.g. name: run"
    for key, text in (("name", recipe.name), ("run_dir", recipe.run_dir)):
        if not text.isprintable() or max(len(part.encode()) for part in text.split("/")) > _MAX_NAME_BYTES:
            yield f"{key}={shown(key, text)} must be one line, names of at most {_MAX_NAME_BYTES} bytes; shorten it"
    if not recipe.run_dir.strip():
        yield f"run_dir={recipe.run_dir!r} is no folder; type e.g. run_dir: runs/{{name}}"
    remote = recipe.checkpoint.remote or ""
    for key, text, example in (
        ("run_dir", recipe.run_dir, "runs/{name}"),
        ("checkpoint.remote", remote, "s3://bucket/runs/{name}"),
    ):
        try:
            text.format(name=recipe.name)
        except (KeyError, IndexError, ValueError, AttributeError):
            yield f"{key}={shown(key, text)} may contain `{{name}}` and no other braces; type e.g. {key}: {example}"


def _batch(recipe: Sections) -> Iterator[str]:
    row, micro, step = (
        recipe.data.sequence_length,
        recipe.batch.tokens_per_micro_batch,
        recipe.batch.tokens_per_step,
    )
    if micro % row:
        yield (
            f"batch.tokens_per_micro_batch={micro} is no multiple of data.sequence_length={row}; "
            f"set batch.tokens_per_micro_batch={near_multiples(micro, row)}"
        )
    if step % micro:
        yield (
            f"batch.tokens_per_step={step} is no multiple of batch.tokens_per_micro_batch={micro}; "
            f"set batch.tokens_per_step={near_multiples(step, micro)}"
        )


def _length(recipe: Sections) -> Iterator[str]:
    train = recipe.train
    if recipe.phases:  # each has its own
        return
    given = [key for key in LENGTHS if getattr(train, key) is not None]
    if not given:
        yield (
            "the length of the run is missing; set train.epochs (passes over the data), train.total_tokens (tokens) or "
            "train.steps (optimizer steps)"
        )
    if len(given) > 1:
        first, second = given[:2]
        yield (
            f"train.{first}={getattr(train, first)} and train.{second}={getattr(train, second)} are both given; "
            f"keep one (train.{second}=null or train.{first}=null)"
        )
    streams = [s.name for s in sources_of(recipe.data) if isinstance(s, HfDataset) and s.streaming]
    if recipe.data.subset is not None and streams:
        yield (
            f"data.subset takes rows by their number, and {streams[0]!r} is a stream; set its streaming to false, or "
            f"remove data.subset"
        )
    if train.epochs is not None and streams:
        yield (
            f"train.epochs={train.epochs:g} needs to know how much text there is, and {streams[0]!r} is a stream, "
            f"which is not read beforehand; set its streaming to false, or give train.total_tokens"
        )


def _context(recipe: Sections) -> Iterator[str]:
    limit, source = recipe.model.max_context, "model.max_context"
    if limit is None and recipe.model.config is not None:
        limit, source = recipe.model.config.get("max_position_embeddings"), "model.config.max_position_embeddings"
    data = recipe.data
    if isinstance(limit, int) and data.text_length > limit:
        longest = limit * (data.sequence_length // data.text_length)
        yield (
            f"data.sequence_length={data.sequence_length} is longer than the context of the model, "
            f"{source}={limit}; set data.sequence_length={longest} or raise {source}"
        )


def _frozen(recipe: Sections) -> Iterator[str]:
    kind = recipe.model.frozen_dtype
    if kind not in ("auto", "fp32", "bf16") and not recipe.techniques and not recipe.phases:
        yield (
            f"model.frozen_dtype={kind} keeps what does not train in fewer bits, and without techniques everything "
            f"trains; remove it, or add e.g. {{type: lora}}"
        )
    if kind == "stored" and recipe.model.path is None and not recipe.phases:
        yield (
            "model.frozen_dtype=stored keeps weights as the folder in model.path says, and model.config has no folder; "
            "set model.path to one that the pass lq_lora wrote, or model.frozen_dtype=nf4"
        )


def _data(recipe: Sections) -> Iterator[str]:
    data = recipe.data
    if not data.is_plain_text and any(isinstance(source, LocalCorpus) for source in sources_of(data)):
        wanted = {
            "sft": ("chats", "a column of messages"),
            "preference": ("chats", "columns prompt, chosen and rejected"),
            "sentence_pairs": ("pairs", "columns anchor and positive"),
        }
        what, rows = wanted[data.task]
        yield (
            f"data.task={data.task} needs {what}, and local_corpus has none; set data.source={{type: hf, path: "
            f"{what}.jsonl}} with {rows}, or data.task=pretrain"
        )
    yield from _pairs(recipe)
    if recipe.eval.tokens_per_domain < data.sequence_length:
        yield (
            f"eval.tokens_per_domain={recipe.eval.tokens_per_domain} is less than one row of data.sequence_length="
            f"{data.sequence_length}; set eval.tokens_per_domain={data.sequence_length} or more"
        )


def _pairs(recipe: Sections) -> Iterator[str]:
    data, named = recipe.data, [(c.type, c) for c in recipe.techniques]  # type: ignore[attr-defined]
    comparing = [name for name, config in named if config.num_compared()]
    for name, config in named:
        if config.num_compared() not in (0, data.num_pieces):
            mismatched = "true" if config.num_compared() == 3 else "false"
            yield (
                f"{name} compares answers, and data has none for it; set data.task=preference and "
                f"data.mismatched_answers={mismatched}"
            )
        if comparing and config.takes_tokens_out():
            yield f"{comparing[0]} compares whole answers, and {name} takes tokens out of them; remove one of the two"
    if len(comparing) > 1:
        yield f"{comparing[0]} and {comparing[1]} are each a loss over pairs; keep one"
    if data.task != "preference":
        return
    if not comparing:
        yield "data.task=preference has pairs of answers, and nothing compares them; add e.g. {type: dpo} to techniques"
    if recipe.train.cross_entropy_weight > 0:
        yield (
            f"train.cross_entropy_weight={recipe.train.cross_entropy_weight:g} would teach the rejected answers of "
            f"data.task=preference as well; set train.cross_entropy_weight=0"
        )
    streams = [s.name for s in sources_of(data) if isinstance(s, HfDataset) and s.streaming]
    if streams:
        yield f"data.task=preference keeps pairs in one row, and {streams[0]!r} is a stream; set its streaming to false"


def _schedules(recipe: Sections) -> Iterator[str]:
    train = recipe.train
    if recipe.phases or (train.total_tokens is None) == (train.steps is None):  # said elsewhere
        return
    for config in recipe.techniques:
        yield from config.problems_in_a_run_of(num_steps(recipe))


def _secrets(recipe: Sections) -> Iterator[str]:
    for path in find_secrets(recipe.model_dump(mode="json")):
        yield (
            f"{'.'.join(map(str, path))} looks like a credential, and recipes are saved with every checkpoint; "
            f"remove it and log in outside the recipe (`hf auth login`, `wandb login`)"
        )
