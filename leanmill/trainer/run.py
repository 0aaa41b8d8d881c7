"""One run from recipe to report: what `launch/train.py` and `leanmill train` call."""

from __future__ import annotations

import gc
import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanmill.checkpoint.manager import CheckpointManager
from leanmill.checkpoint.workers import Stateful
from leanmill.core.blocks import decoder_blocks
from leanmill.core.errors import ConfigError
from leanmill.core.rules import state_of
from leanmill.core.technique import token_shares
from leanmill.data.agreement import check_ranks_agree, on_every_rank
from leanmill.data.build import build_eval_data, build_tokenizer, build_train_data
from leanmill.data.evaluation import EvalDomain
from leanmill.data.train_data import TrainData
from leanmill.models.build import build_on_meta
from leanmill.models.counting import num_parameters
from leanmill.models.flops import flops_per_token
from leanmill.parallel.build import build_engine
from leanmill.parallel.collectives import barrier
from leanmill.parallel.expert_parallel import check_experts, num_held_parameters
from leanmill.parallel.launch import set_timeout
from leanmill.parallel.low_comm.build import outer_steps
from leanmill.parallel.precision import resolve_precision
from leanmill.parallel.shared_errors import lost_rank
from leanmill.parallel.slow_ranks import SlowRanks
from leanmill.parallel.tensor_plan import split_dims
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import micro_batches_of_step, with_length_in_tokens
from leanmill.recipe.rules import num_steps as steps_of_run
from leanmill.report.loggers.build import build_observers
from leanmill.report.observer import DomainScore, EvalRecord, Observer, RunInfo
from leanmill.trainer.beginning import Beginning, Start, saved_part
from leanmill.trainer.evaluation import evaluate
from leanmill.trainer.frozen import frozen_flops_per_token
from leanmill.trainer.loop import Loop
from leanmill.trainer.prepare import Prepared, prepare, with_precision
from leanmill.trainer.processes import Processes, processes
from leanmill.trainer.recipe_file import write_recipe
from leanmill.trainer.rewind import Back, RewindError, Rewinds
from leanmill.trainer.run_lock import RunLock, exclusive
from leanmill.trainer.samples import Sampler
from leanmill.trainer.stop import Stop


log = logging.getLogger(__name__)

LOST_SAVE_SECONDS = 5.0
"""What a save under way has to end once a rank is lost."""


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """What a finished run tells its caller."""

    status: str
    """`finished` or `stopped`."""
    run_dir: Path
    step: int
    num_skipped: int
    """Steps whose update was not applied, since the start of the run."""
    scores: dict[str, DomainScore]
    """Last evaluation, by domain."""
    rank: int
    interrupted: bool = False
    """Stopped by Ctrl-C (SIGINT) rather than by a scheduler."""


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The first steps of a run of which nothing is left: no checkpoint, no evaluation, no log."""

    num_steps: int
    """After how many it ends; schedules are those of the whole run."""
    observers: list[Observer]
    """In place of the recipe's."""


def run(recipe: Recipe) -> RunResult:
    """Train `recipe` to its end, resuming where its run_dir has a checkpoint; one with phases is for `leanmill.phases`.

    Under torchrun every rank calls this. The process group is taken down before it returns; a
    launch script then leaves through `os._exit`.

    Raises:
        ConfigError: The recipe asks for something impossible here.
        RunError: Something failed on the way.
        KeyboardInterrupt: Ctrl-C before training began, twice, or not served within its limit.
    """
    if recipe.phases:
        raise ConfigError("a recipe with phases is more than one stretch of training; call leanmill.phases.run.run")
    with processes(recipe) as given:
        return run_in(given, recipe)


def run_in(
    given: Processes, recipe: Recipe, start: Start | None = None, *, rehearsal: Rehearsal | None = None
) -> RunResult:
    """Do what `run` does in processes that were joined before and are kept; see there.

    Args:
        given: The processes.
        recipe: The recipe.
        start: What it begins with, where its run_dir has no checkpoint.
        rehearsal: Where only the first steps are wanted.
    """
    rewinds, back = Rewinds(), None
    with exclusive(recipe.run_folder, given.ranks.rank) as lock:
        while True:
            run = _Run(recipe, given, lock, start, back, rehearsal)
            try:
                return run.go()
            except RewindError as rewind:
                # All anew, as in a process that resumes: no state of what went wrong is left.
                back = rewinds.back(rewind, run.manager)
                run.engine.close()
            del run
            gc.collect()


class _Run:
    """The objects of one run, built in order."""

    def __init__(
        self,
        recipe: Recipe,
        given: Processes,
        lock: RunLock,
        start: Start | None,
        back: Back | None = None,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.ranks, self.signals, self.pulse = given.ranks, given.signals, given.pulse
        self.lock, self.start, self.back, self.rehearsal = lock, start, back, rehearsal
        # The resolved precision goes into what is saved: a resumed run computes like its beginning.
        self.recipe = with_precision(recipe, given.ranks.device.type)
        self.run_dir = recipe.run_folder
        self.scores: dict[str, DomainScore] = {}
        torch.manual_seed(recipe.seed)
        torch.use_deterministic_algorithms(recipe.train.deterministic)

    def go(self) -> RunResult:
        recipe, ranks = self.recipe, self.ranks
        self.pulse.enter("reading the data")
        tokenizer = on_every_rank(lambda: build_tokenizer(recipe.data, seed=recipe.seed))
        self.sampler = Sampler(recipe, tokenizer)
        # Before the data, which may take long to tokenise.
        model = build_on_meta(
            recipe.model,
            vocab_size=len(tokenizer),
            sequence_length=recipe.data.text_length,
            device_type=ranks.device.type,
            packed=recipe.data.document_mask,
            compiled=recipe.train.compile,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.domains, self.data = on_every_rank(lambda: self._read_data(tokenizer))
        check_ranks_agree(self.data.identity, self.domains)
        # What is saved has the length in tokens: a resumed run is as long as its beginning.
        self.recipe = recipe = with_length_in_tokens(recipe, self.data.rows_per_epoch)
        self.pulse.enter("preparing the model")
        why = self._build_engine(model)
        num_micro_batches = micro_batches_of_step(recipe, self.engine.data_size)
        self.manager = self._manager()
        self.beginning = Beginning.find(recipe, self.manager, self.data, self.start, self.back)
        self.recipe = recipe = self.beginning.recipe
        shares = token_shares(recipe.techniques, len(decoder_blocks(model)))
        further = sum(technique.further_tokens() for technique in recipe.techniques)
        flops = flops_per_token(model, recipe.data.sequence_length, shares, further_tokens=further)
        flops += frozen_flops_per_token(recipe)
        num_total, _ = num_parameters(model)
        prepared = prepare(
            recipe,
            model,
            self.engine,
            num_micro_batches=num_micro_batches,
            tokenizer=tokenizer,
            data_fingerprint=self.data.fingerprint,
            rule_states=self.beginning.rule_states,
            resumes=self.beginning.path is not None,
        )
        self.saved = saved_part(recipe, model, prepared)
        self.probes = prepared.techniques.probes
        low_comm = recipe.layout.low_comm
        self.outer = None if low_comm is None else outer_steps(low_comm, self.engine)
        rows_left_out = self.beginning.load(prepared, self.engine, self.saved, self._stateful)
        # Those count as read: what is left of the run is so much shorter.
        self.tokens_before = self.beginning.state.get("tokens", 0) + rows_left_out * recipe.data.sequence_length
        self.manager.clear_away()
        state = self.beginning.state
        num_steps = steps_of_run(recipe, step=state.get("step", 0), tokens=self.tokens_before)
        self._write_recipe(tokenizer)
        self.observers = self._observers()
        loop = self._loop(prepared, num_steps, num_micro_batches)
        info = RunInfo(
            recipe=recipe,
            run_dir=self.run_dir,
            engine=self.engine,
            rank=ranks.rank,
            world_size=ranks.world_size,
            num_steps=num_steps,
            start_step=loop.step,
            num_parameters=num_total,
            num_trainable=prepared.num_trainable,
            flops_per_token=flops,
            epochs=self.data.epochs(self._num_rows(num_steps)),
            notes=(why, prepared.conversion, *self.engine.notes, *self._data_notes(num_steps), *self.beginning.notes),
        )
        return self._train(loop, info)

    def _observers(self) -> list[Observer]:
        if self.rehearsal is not None:
            return self.rehearsal.observers
        return build_observers(self.recipe, self.run_dir, self.ranks.rank)

    def _manager(self) -> CheckpointManager:
        asked = self.recipe.checkpoint
        remote = None if asked.remote is None else asked.remote.format(name=self.recipe.name)
        layout, rank, worker = self.engine.layout, self.ranks.rank, None
        if layout.workers > 1:
            worker = layout.worker(rank), rank % layout.step_size
        elif layout.pp > 1:
            worker = 0, layout.rank_in_stage(rank)
        return CheckpointManager(
            self.run_dir,
            asked,
            overlap=True,
            before_write=self.lock.check,
            remote=remote,
            worker=worker,
            in_parts=layout.pp > 1,
        )

    @property
    def _stateful(self) -> Stateful:
        """What is saved and loaded."""
        return self.engine if self.outer is None else self.outer

    def _build_engine(self, model: nn.Module) -> str:
        """Build the engine and return why it is this one."""
        recipe, ranks = self.recipe, self.ranks
        num_sharers = recipe.layout.num_expert_ranks(ranks.world_size)
        check_experts(model, num_sharers, is_even=recipe.layout.experts.type == "spread")
        self.engine, why = build_engine(
            recipe.engine,
            ranks=ranks,
            precision=resolve_precision(recipe.train.precision, ranks.device.type),
            model_bytes=4
            * num_held_parameters(model, num_sharers, split_dims(model, recipe.layout.tp), recipe.layout.tp),
            layout=recipe.layout,
        )
        return why

    def _read_data(self, tokenizer: Any) -> tuple[list[EvalDomain], TrainData]:
        recipe = self.recipe
        domains = build_eval_data(recipe.data, tokenizer, tokens_per_domain=recipe.eval.tokens_per_domain)
        return domains, build_train_data(recipe.data, tokenizer, seed=recipe.seed)

    def _train(self, loop: Loop, info: RunInfo) -> RunResult:
        for observer in self.observers:
            observer.on_start(info)
        try:
            with self.signals:
                if self.recipe.eval.at_start and loop.step == 0:
                    self._evaluate(0)
                stop = loop.run(lambda: max(self.signals.level, self._ends_here))
                self.manager.wait()
                # A run that was told to stop has its checkpoint and little time left.
                if not stop and not self.scores:
                    self._evaluate(loop.step)
                self.manager.close()
        except KeyboardInterrupt:
            # Nothing is waited for; a checkpoint that was being written does not count, the one before does.
            self._end("stopped", "interrupted; the newest checkpoint is where it continues")
            raise
        except RewindError as rewind:
            self.manager.drain()
            self.manager.close()  # two managers of one run would take each other's uploads for another run's
            self._end("rewound", rewind.why)
            raise
        except BaseException as error:
            lost = lost_rank(error)
            # Its collectives have hours: a rank may wait for the slowest one's disk, but not for one that is gone.
            self.manager.drain(None if lost is None else LOST_SAVE_SECONDS)
            told = lost or error
            self._end("failed", f"{type(told).__name__}: {told}")
            raise
        status = "stopped" if stop else "finished"
        self._end(status)
        barrier()
        self.engine.close()
        return RunResult(
            status=status,
            run_dir=self.run_dir,
            step=loop.step,
            num_skipped=loop.meter.num_skipped,
            scores=self.scores,
            rank=self.ranks.rank,
            interrupted=stop is Stop.INTERRUPTED,
        )

    @property
    def _ends_here(self) -> Stop:
        is_over = self.rehearsal is not None and self.loop.step >= self.rehearsal.num_steps
        return Stop.STOPPED if is_over else Stop.NOT_ASKED

    def _end(self, status: str, message: str = "") -> None:
        for observer in self.observers:
            observer.on_end(status, message)

    def _loop(self, prepared: Prepared, num_steps: int, num_micro_batches: int) -> Loop:
        recipe, state = self.recipe, self.beginning.state
        self.loop = Loop(
            recipe=recipe,
            engine=self.engine,
            data=self.data,
            step_rules=prepared.techniques.step_rules,
            observers=self.observers,
            num_steps=num_steps,
            num_micro_batches=num_micro_batches,
            save=self._save,
            evaluate=self._evaluate,
            before_update=self.manager.finish_copies,
            on_first_step=lambda: set_timeout(recipe.cluster.step_timeout_seconds),
            rows_per_epoch=self.data.rows_per_epoch,
            step=state.get("step", 0),
            num_skipped=state.get("num_skipped", 0),
            pulse=self.pulse,
            slow_ranks=self._slow_ranks(),
            outer=self.outer,
        )
        if self.loop.spikes is not None and state.get("spikes"):
            self.loop.spikes.load_state_dict(state["spikes"])
        return self.loop

    def _slow_ranks(self) -> SlowRanks | None:
        factor, ranks = self.recipe.cluster.slow_rank_factor, self.ranks
        # NCCL only queues on the host, so its times of asking say nothing of the device. What a stage of a pipeline
        # waits for the one before would count as its own.
        if factor is None or ranks.world_size == 1 or ranks.device.type != "cpu" or self.engine.layout.pp > 1:
            return None
        return SlowRanks(
            pulse=self.pulse,
            rank=ranks.rank,
            world_size=ranks.world_size,
            factor=factor,
            waits_between=self.engine.waits_between,
        )

    def _write_recipe(self, tokenizer: Any) -> None:
        if self.ranks.rank == 0:
            write_recipe(self.run_dir, self.recipe)
            tokenizer.save_pretrained(self.run_dir / "tokenizer")
        barrier()

    def _num_rows(self, num_steps: int) -> int:
        """Rows of the whole run; steps that a resumed run did in another size are in its position."""
        rows_per_step = self.recipe.batch.tokens_per_step // self.recipe.data.sequence_length
        state = self.beginning.state
        rows_done = self.tokens_before // self.recipe.data.sequence_length
        return rows_done + (num_steps - state.get("step", 0)) * rows_per_step

    def _data_notes(self, num_steps: int) -> list[str]:
        num_rows = self._num_rows(num_steps)
        shortfalls = [line for domain in self.domains for line in domain.shortfall()]
        warnings = [f"WARNING: {line}" for line in (*self.data.warnings(num_rows), *shortfalls)]
        return [self.data.describe(num_rows), *warnings]

    def _save(self, step: int) -> None:
        if self.rehearsal is not None:
            return
        state = {
            "step": step,
            "num_steps": self.loop.num_steps,
            "tokens": self.data.position_tokens,
            "data": self.data.state_dict(),
            "seed": self.recipe.seed,
            "world_size": self.ranks.world_size,
            "num_skipped": self.loop.meter.num_skipped,
            "rules": state_of(self.loop.step_rules),
            "engine": self.engine.state_dict(),
        }
        if self.loop.spikes is not None:
            state["spikes"] = self.loop.spikes.state_dict()
        score = self.scores["all"].loss if self.scores_step == step and self.scores else None
        recipe = self.recipe.model_dump(mode="json")
        seconds = self.manager.save(step, self._stateful, state, recipe, score=score, **self.saved)
        for observer in self.observers:
            observer.on_checkpoint(step, self.run_dir / "checkpoints" / f"step-{step:08d}", seconds)

    scores_step = -1

    def _evaluate(self, step: int) -> None:
        if self.rehearsal is not None:
            return
        recipe = self.recipe
        rows = recipe.batch.tokens_per_micro_batch // recipe.data.sequence_length
        with nullcontext() if self.outer is None else self.outer.global_weights():
            found = evaluate(self.engine, self.domains, rows, self.probes)
            samples = self.sampler(self.engine)
        self.scores, self.scores_step = dict(found.scores), step
        record = EvalRecord(
            step=step,
            tokens=self.data.position_tokens,
            domains=self.scores,
            metrics=found.metrics,
            tables=found.tables,
            notes=found.notes,
            samples=samples,
        )
        for observer in self.observers:
            observer.on_eval(record)
