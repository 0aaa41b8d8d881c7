"""A recipe in plain words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from leanmill.checkpoint.phases import MODEL
from leanmill.core.near import near_multiples
from leanmill.core.registry import PASSES, known_techniques
from leanmill.data.config import DataConfig, LocalCorpus, Prepared, Source, sources_of
from leanmill.parallel.config import FullyShardedExperts
from leanmill.parallel.context_plan import sent_numbers
from leanmill.parallel.pipeline_plan import pipeline_numbers, stages_per_rank
from leanmill.recipe.on_this_machine import not_looked_at
from leanmill.recipe.phases import FRESH, PhaseConfig, phase_names, source_of
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import known_steps


def explain(recipe: Recipe, world_sizes: Sequence[int] = (1, 2, 8)) -> str:
    """Return a recipe in plain words: what is trained, on what, how, and what is written where."""
    if not recipe.phases:
        return "\n".join([f"recipe {recipe.name!r} is valid", *_listed(_sections(recipe, world_sizes))])
    lines = [f"recipe {recipe.name!r} is valid, {len(recipe.phases)} phases"]
    told: dict[str, list[str]] = {}
    to_come = [f"{recipe.folder_of_phase(index)}/{MODEL}" for index in range(len(recipe.phases))]
    for index, name in enumerate(phase_names(recipe.phases)):
        lines += ["", f"phase {index + 1}, {name}: {_start(recipe, index)}"]
        lines += [f"  pass {line}" for line in _passes(recipe.phases[index])]
        if score := recipe.phases[index].score:
            models = f"{score.teacher_model} against {score.reference_model}"
            lines.append(f"  documents are scored by {models} first ({score.method})")
        if rewound := recipe.phases[index].rewind_to:
            values = "values drawn anew" if rewound == FRESH else f"the values it had in {rewound}"
            lines += [f"  what is left takes {values}"]
        if recipe.phases[index].trains:
            sections = _sections(recipe.of_phase(index), world_sizes, to_come)
            # What the first phase said goes for the later ones.
            lines += [f"  {line}" for line in _listed({k: v for k, v in sections.items() if told.get(k) != v})]
            told = told or sections
        else:
            lines += [f"  written {recipe.folder_of_phase(index)}/{MODEL}/"]
    return "\n".join(lines)


def _start(recipe: Recipe, index: int) -> str:
    source, step = source_of(recipe.phases, index)
    if source is None:
        is_own = "model" in (recipe.phases[index].overrides or {})
        return "starts from a model of its own" if is_own else "starts from the model of the recipe"
    recipes = [recipe.of_phase(i) if phase.trains else recipe for i, phase in enumerate(recipe.phases)]
    carries, keep = recipe.carries_state(index, recipes), recipe.phases[index].keep
    what = "the checkpoint itself" if carries else "the model, techniques folded,"
    kept = f"; the {' and '.join(sorted(keep))} go on" if keep else ""
    return f"starts from {what} of {phase_names(recipe.phases)[source]}{f' at step {step}' if step else ''}{kept}"


def _passes(phase: PhaseConfig) -> Iterator[str]:
    for config in phase.passes:
        options = config.model_dump(mode="json", exclude={"type"}, exclude_defaults=True)
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
        name = str(config.type)  # type: ignore[attr-defined]
        rows = f"; {phase.calibration.num_rows} rows of calibration" if config.reads_text else ""
        yield f"{name} ({given}): {PASSES[name].summary}{rows}"


def _sections(recipe: Recipe, world_sizes: Sequence[int], to_come: Collection[str] = ()) -> dict[str, list[str]]:
    return {
        "model": _model(recipe),
        "data": _data(recipe.data),
        "techniques": _techniques(recipe),
        "engine": [_engine(recipe)],
        "layout": _layout(recipe),
        "batch": _batch(recipe, world_sizes),
        "length": [_length(recipe)],
        "optimizer": [_optimizer(recipe)],
        "numerics": [_numerics(recipe)],
        "evaluation": [_evaluation(recipe)],
        "written": _written(recipe),
        "not checked": list(not_looked_at(recipe, to_come)),
    }


def _listed(sections: Mapping[str, Sequence[str]]) -> list[str]:
    width = max((len(name) for name, text in sections.items() if text), default=0)
    return [
        f"{name if index == 0 else '':<{width}}  {line}"
        for name, text in sections.items()
        for index, line in enumerate(text)
    ]


def _model(recipe: Recipe) -> list[str]:
    return [*_weights(recipe), *_attention(recipe)]


def _attention(recipe: Recipe) -> list[str]:
    """What attends to rows of several documents; which families have it, building them says."""
    if recipe.model.attention != "auto":
        return [f"attention: {recipe.model.attention}"]
    if recipe.model.task != "causal_lm" or not recipe.data.document_mask or recipe.layout.cp > 1:
        return []
    of_cpu = "sdpa with a mask, for compiled blocks" if recipe.train.compile else "each document of a row alone"
    here = {"cpu": f"{of_cpu} (CPU)", "cuda": "flex_attention (CUDA)"}
    chosen = here.get(recipe.device) or " or ".join(here.values())
    return [f"attention: {chosen}, where the family has it; else sdpa with a mask"]


def _weights(recipe: Recipe) -> list[str]:
    model = recipe.model
    if model.path is not None:
        revision = f" at revision {model.revision}" if model.revision else ""
        remote = ", running Python code that comes with it" if model.trust_remote_code else ""
        dropout = "" if model.dropout is None else f", dropout {model.dropout:g}"
        return [f"weights and configuration of {model.path}{revision}{remote}{dropout}"]
    config, mixture = model.family_config or {}, model.mixture
    sizes = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
    known = [f"{config[key]} {name}" for name, key in sizes.items() if key in config]
    tied = ", tied embeddings" if config.get("tie_word_embeddings") else ""
    tied += "" if model.dropout is None else f", dropout {model.dropout:g}"
    said = f"{', '.join(known)}{tied}"
    family = f"{config.get('model_type')} with random weights of seed {recipe.seed}{': ' if known else ''}{said}"
    return [family, *(mixture.lines() if mixture else [])]


def _data(data: DataConfig) -> list[str]:
    what = {
        "pretrain": "whole text, packed into rows",
        "sft": "chats, loss on the answers only",
        "preference": "pairs of answers, each pair in one row",
        "masked": f"whole text, packed into rows, {data.masking.share:.0%} of tokens hidden and predicted, rows",
        "sentence_pairs": f"pairs of texts with {data.num_negatives} negatives, in {data.num_pieces} parts of rows",
    }[data.task]
    mask = "no token attends across documents" if data.document_mask else "documents of a row attend to each other"
    trained = (
        "that of the prepared data"
        if data.trained_vocab_size is None
        else f"byte-level BPE of {data.trained_vocab_size:,} tokens, trained on the data"
    )
    tokenizer = data.tokenizer.path or trained
    if data.tokenizer.trust_remote_code:
        tokenizer += ", running Python code that comes with it"
    return [
        " + ".join(_source(source) for source in sources_of(data)),
        f"{what} of {data.sequence_length:,} tokens; {mask}; longer documents: {data.long_document_rule}",
        *([] if data.subset is None else [f"{data.subset.share:.3g} of the rows a round, drawn {data.subset.draw}"]),
        f"tokenizer: {tokenizer}",
    ]


def _source(source: Source) -> str:
    if isinstance(source, Prepared):
        kept = "" if source.scores is None else f", the best {source.kept_share or 0.5:.0%} by {source.scores}"
        return f"tokens prepared in {source.path}{kept}"
    if isinstance(source, LocalCorpus):
        weights = ", ".join(f"{name} x {weight:g}" for name, weight in source.domains.items())
        return f"text found on this machine ({weights})"
    return f"{source.path} split {source.split!r}{' as a stream' if source.streaming else ''}"


def _techniques(recipe: Recipe) -> list[str]:
    if not recipe.techniques:
        return ["none: every weight stays plain"]
    lines = []
    for technique in recipe.techniques:
        name = str(getattr(technique, "type", type(technique).__name__))
        options = technique.model_dump(mode="json", exclude={"type"}, exclude_defaults=True)
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
        lines.append(f"{name} ({given}): {known_techniques()[name].summary}")
    if len(lines) > 1:
        lines.append("on one weight they apply as delta, then mask, then quantiser, whatever order is listed here")
    return lines


def _engine(recipe: Recipe) -> str:
    engine = recipe.engine
    options = engine.model_dump(mode="json", exclude={"type"}, exclude_defaults=True)
    given = f" ({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""
    return f"{engine.type}{given}: {' '.join((type(engine).__doc__ or '').split())}"


def _layout(recipe: Recipe) -> list[str]:
    layout, sharded = recipe.layout, recipe.layout.dp_shard
    lines = []
    if sharded is not None or layout.dp_replicate is not None:
        lines.append(f"replicas {layout.dp_replicate or 'as ranks allow'} x shards {sharded or 'as ranks allow'}")
    if isinstance(layout.experts, FullyShardedExperts):
        moved = layout.experts.move_every_steps
        lines.append(
            f"experts fully sharded over all ranks, copies by {layout.experts.materialise}; owners "
            + ("stay" if moved is None else f"follow the load every {moved} steps")
        )
    if layout.ep > 1:
        pieces = f" in {layout.expert_chunks} pieces" if layout.expert_chunks > 1 else ""
        again = ", and once more in backward" if layout.expert_resend else ""
        lines.append(
            f"ep {layout.ep}: groups of {layout.ep} ranks share the experts of each layer; tokens travel to them"
            f"{pieces}{again}"
        )
    if layout.tp > 1:
        lines.append(
            f"tp {layout.tp}: groups of {layout.tp} neighbouring ranks share the matmuls of each layer and read the "
            f"same data; activations travel between them"
            + ("; between matmuls each has a part of the tokens" if layout.sequence_parallel else "")
        )
    if layout.cp > 1:
        has = "a part of every row each"
        if layout.cp_rows == "by_document":
            has = "whole documents of a micro-batch, and parts of long ones,"
        lines.append(
            f"cp {layout.cp} ({layout.cp_attention}): groups of {layout.cp} neighbouring ranks have {has} and read the "
            f"same data; {_travel(recipe)}"
        )
    if layout.pp > 1:
        lines.append(_pipeline(recipe))
    if layout.low_comm is not None:
        lines += layout.low_comm.lines()
    return lines


def _pipeline(recipe: Recipe) -> str:
    """What ranks that have some blocks each send and wait, where the recipe says the model's size."""
    layout, hidden = recipe.layout, (recipe.model.family_config or {}).get("hidden_size")
    split = None if layout.pp_split == "balance" else layout.pp_split
    of_rank = stages_per_rank(layout.pp_schedule, layout.pp, split)
    line = (
        f"pp {layout.pp} ({layout.pp_schedule}): each of {layout.pp} ranks has some of the blocks, in {of_rank} "
        f"stage{'s' * (of_rank > 1)}, and all read the same data"
    )
    if isinstance(hidden, int):
        tokens = recipe.batch.tokens_per_micro_batch
        numbers = pipeline_numbers(tokens, hidden, layout.pp * of_rank, layout.pp_schedule)
        line += f"; {numbers} numbers travel for each micro-batch"
    return line


def _travel(recipe: Recipe) -> str:
    """What ranks that share rows send, where the recipe says the model's sizes."""
    layout, config = recipe.layout, recipe.model.family_config or {}
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not (isinstance(heads, int) and isinstance(hidden, int)):
        return "they meet in attention"
    groups, size = config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads
    numbers = sent_numbers(heads, groups, size, layout.cp, layout.cp_attention)
    which = "its tokens in documents that all ranks share" if layout.cp_rows == "by_document" else "its tokens"
    return f"in attention each sends {numbers:,} numbers a layer for each of {which}, and as many in backward"


def _batch(recipe: Recipe, world_sizes: Sequence[int]) -> list[str]:
    batch, row = recipe.batch, recipe.data.sequence_length
    lines = [
        f"{batch.tokens_per_step:,} tokens an optimizer step = {batch.tokens_per_step // row:,} rows of {row:,}; "
        f"{batch.tokens_per_micro_batch:,} tokens = {batch.tokens_per_micro_batch // row:,} rows a forward on one rank"
    ]
    for size in (size for size in world_sizes if size % (recipe.layout.tp * recipe.layout.cp * recipe.layout.pp) == 0):
        share = batch.tokens_per_micro_batch * recipe.layout.data_size(size)
        ranks = f"{size} rank{'s' if size > 1 else ''}"
        if batch.tokens_per_step % share == 0:
            rounds = batch.tokens_per_step // share
            how = f"{rounds} micro-batches accumulated" if rounds > 1 else "one micro-batch, nothing to accumulate"
            lines.append(f"on {ranks}: {how}")
        else:
            lines.append(
                f"on {ranks}: impossible, {share:,} tokens a round; "
                f"set batch.tokens_per_step={near_multiples(batch.tokens_per_step, share)}"
            )
    return lines


def _length(recipe: Recipe) -> str:
    steps, epochs = known_steps(recipe), recipe.train.epochs
    if steps is None:
        passes = f"{epochs:g} pass{'' if epochs == 1 else 'es'}"
        return f"{passes} over the training data; how many steps that is, training says once it is tokenised"
    return f"{steps:,} optimizer steps = {steps * recipe.batch.tokens_per_step:,} tokens"


def _optimizer(recipe: Recipe) -> str:
    optimizer, schedule, steps = recipe.optimizer, recipe.schedule, known_steps(recipe)
    warmup = schedule.warmup_steps
    if isinstance(warmup, int) or steps is not None:
        warmup_steps = f"{warmup if isinstance(warmup, int) else round(warmup * (steps or 0)):,} warm-up steps"
    else:
        warmup_steps = f"{warmup:.3g} of the steps as warm-up"
    wrapped = ", wrapped in Lookahead" if optimizer.lookahead else ""
    lower = 1.0 if schedule.drop_at is None else schedule.drop_factor
    last = lower * schedule.min_factor * optimizer.lr
    drop = f", times {lower:g} from {schedule.drop_at:.0%} of the run" if schedule.drop_at else ""
    until = f" until {schedule.weight_decay_until:.0%} of the run" if schedule.weight_decay_until else ""
    return (
        f"{optimizer.type}{wrapped}, peak learning rate {optimizer.lr:g} after {warmup_steps}, then "
        f"{schedule.type}{'' if schedule.type == 'constant' else f' to {last:g}'}{drop}; "
        f"weight decay {optimizer.weight_decay:g}{until}"
    )


def _numerics(recipe: Recipe) -> str:
    train = recipe.train
    clip = f"gradients clipped to norm {train.max_grad_norm:g}" if train.max_grad_norm else "no clipping"
    extras = [
        *(["blocks compiled"] if train.compile else []),
        *(["deterministic kernels only"] if train.deterministic else []),
        *([f"{train.activation_checkpointing} recomputation"] if train.activation_checkpointing != "none" else []),
    ]
    does = {"stop": "stops the run", "skip": "skips the step", "rewind": "goes back to the checkpoint before"}
    finite = f"a non-finite gradient {does[train.non_finite]}"
    spike = [] if train.spike is None else [f"a spike of {train.spike.sigmas:g} sigmas {does[train.spike.action]}"]
    return ", ".join([train.precision, clip, finite, *spike, *extras])


def _evaluation(recipe: Recipe) -> str:
    every = recipe.eval.every_steps
    when = f"every {every:,} steps and at the end" if every else "at the end"
    first = "before the first step, " if recipe.eval.at_start else ""
    return f"{first}{when}, on {recipe.eval.tokens_per_domain:,} held-out tokens of each domain"


def _written(recipe: Recipe) -> list[str]:
    run_dir, checkpoint, log = recipe.run_folder, recipe.checkpoint, recipe.log
    every = f"every {checkpoint.every_steps:,} steps and at the end" if checkpoint.every_steps else "at the end"
    best = " and the best" if checkpoint.keep_best else ""
    resume = {
        "auto": "the same command continues from the newest",
        "never": "a run_dir that has one is refused",
    }.get(checkpoint.resume, f"training starts from {checkpoint.resume}")
    logs = [
        f"{run_dir}/metrics.jsonl (every {log.every_steps} steps)",
        *([f"{run_dir}/tensorboard/"] if log.tensorboard else []),
        *([f"{run_dir}/wandb/"] if log.wandb else []),
        *([f"{run_dir}/report.html"] if log.report else []),
    ]
    return [
        f"{run_dir}/checkpoints/ {every}, keeping the last {checkpoint.keep_last}{best}; {resume}",
        *([] if checkpoint.remote is None else [f"copies of them at {checkpoint.remote.format(name=recipe.name)}"]),
        ", ".join(logs),
    ]
