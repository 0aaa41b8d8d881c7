"""A run of several phases, from recipe to the last one's result."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from leanmill.checkpoint.group import SaveGroup
from leanmill.checkpoint.phases import ASKED, DONE, SCORING, phase_folders
from leanmill.core.errors import ConfigError
from leanmill.core.folders import clear_unfinished
from leanmill.evaluate.document_scores import check_models, model_folder, score_documents
from leanmill.evaluate.recovery.scoring import choose_documents, measure_documents
from leanmill.parallel.collectives import max_over_ranks
from leanmill.parallel.launch import set_timeout
from leanmill.phases.check import check_phases
from leanmill.phases.done import asked_of, differences
from leanmill.phases.handover import Handover
from leanmill.recipe.compress import CompressRecipe
from leanmill.recipe.phases import OF_PHASE, phase_names, source_of
from leanmill.recipe.root import Recipe
from leanmill.report.files import write_atomically
from leanmill.trainer.passes.run import compress_in
from leanmill.trainer.processes import Processes, processes
from leanmill.trainer.recipe_file import write_recipe
from leanmill.trainer.run import RunResult, run_in
from leanmill.trainer.run_lock import exclusive
from leanmill.trainer.stop import Stop


log = logging.getLogger(__name__)

_PASSES_TIMEOUT_SECONDS = 24 * 3600
"""Collective time-out while passes run: a rank waits for the slowest layer and for the disk of the first."""


def run(recipe: Recipe) -> RunResult:
    """Do the phases of `recipe` one after another, going on inside the one that was interrupted.

    Under torchrun every rank calls this, once for all phases.

    Returns:
        The last phase's result; steps and skipped steps are summed over all phases.

    Raises:
        ConfigError: The recipe asks for something impossible here, or a finished phase was asked for otherwise.
        RunError: Something failed on the way.
        KeyboardInterrupt: As for `leanmill.trainer.run.run`.
    """
    with processes(recipe) as given:
        run_dir = recipe.run_folder
        with exclusive(run_dir, given.ranks.rank):
            return _Phases(recipe, given, run_dir).go()


class _Phases:
    """The phases of one run, in order."""

    def __init__(self, recipe: Recipe, given: Processes, run_dir: Path) -> None:
        self.recipe, self.given, self.run_dir = recipe, given, run_dir
        self.names, self.group = phase_names(recipe.phases), SaveGroup()
        self.handover = Handover(recipe, self.group)
        self.result = RunResult(
            status="finished", run_dir=run_dir, step=0, num_skipped=0, scores={}, rank=given.ranks.rank
        )

    def go(self) -> RunResult:
        done = self._read_done()
        check_phases(self.recipe, done.keys())
        self._check_models_to_score_with(done)
        if self.given.ranks.rank == 0:
            write_recipe(self.run_dir, self.recipe)
        for index, name in enumerate(self.names):
            if index in done:
                self._add(done[index])
                continue
            if self._is_stopped():
                return replace(self.result, status="stopped")
            log.info("phase %d of %d: %s", index + 1, len(self.names), name)
            record = self._do(index)
            self._add(record)
            if self.result.status == "stopped":
                break
            self._mark_done(index, record)
        return self.result

    def _do(self, index: int) -> dict[str, Any]:
        """Do one phase; return how many steps it took and skipped."""
        phase = self.recipe.phases[index]
        set_timeout(_PASSES_TIMEOUT_SECONDS)
        if phase.passes:
            self._pass(index)
        if not phase.trains:
            return {"steps": 0, "num_skipped": 0}
        if phase.score is not None:
            self._score(index)
            _free_memory()
        recipe, start = self.handover.training(index)
        set_timeout(self.recipe.cluster.init_timeout_seconds)
        result = run_in(self.given, recipe, start)
        self.result = replace(self.result, status=result.status, scores=result.scores, interrupted=result.interrupted)
        _free_memory()
        return {"steps": result.step, "num_skipped": result.num_skipped}

    def _pass(self, index: int) -> None:
        out = self.handover.solved(index)
        if self.group.broadcast("there" if self.handover.passed(index).is_dir() else ""):
            return
        if not self.group.broadcast("there" if out.is_dir() else ""):
            self._solve(index, out)
        self.handover.rewind(index)

    def _solve(self, index: int, out: Path) -> None:
        phase = self.recipe.phases[index]
        trained = self.recipe.of_phase(index) if phase.trains else self.recipe
        compressed = CompressRecipe(
            seed=self.recipe.seed,
            device=self.recipe.device,
            precision=trained.train.precision,
            model=self.handover.model_for_passes(index),
            data=trained.data,
            calibration=phase.calibration,
            passes=self.handover.passes(index),
        )
        self.group.on_first_rank(lambda: clear_unfinished(out))
        for report in compress_in(self.given.ranks, compressed, out):
            log.info("%s", report)

    def _score(self, index: int) -> None:
        """Score the documents of a phase's data, going on behind the shards that have theirs."""
        out, ranks, score = self.handover.scored(index), self.given.ranks, self.recipe.phases[index].score
        assert score is not None, "asked of a phase that scores"
        if self.group.broadcast("there" if out.is_dir() else ""):
            self._check_scored(out, score.written)
            return
        scoring, data = out.with_name(SCORING), self.recipe.of_phase(index).data
        look = measure_documents if score.method == "paser" else score_documents
        look(
            data,
            scoring,
            **self.handover.models_to_score_with(index),
            device=ranks.device,
            rank=ranks.rank,
            world_size=ranks.world_size,
            tell=log.info,
        )
        max_over_ranks(torch.zeros(()))  # all have written theirs
        if score.method == "paser":
            choose = partial(choose_documents, data, scoring, kept_share=score.kept_share, tell=log.info)
            self.group.on_first_rank(lambda: choose(num_clusters=score.groups, seed=self.recipe.seed))
        self.group.on_first_rank(lambda: write_atomically(scoring / ASKED, json.dumps(score.written, indent=2) + "\n"))
        self.group.on_first_rank(lambda: os.replace(scoring, out))

    def _check_scored(self, out: Path, asked: dict[str, Any]) -> None:
        """Refuse scores that are whole and of another `score`."""
        path = out / ASKED
        text = self.group.broadcast(path.read_text(encoding="utf-8") if path.is_file() else "")
        before = json.loads(text) if text else asked
        changed = [f"{key} {before.get(key)} -> {value}" for key, value in asked.items() if before.get(key) != value]
        if changed:
            raise ConfigError(f"{out} was asked for otherwise ({'; '.join(changed)}); remove it to score anew")

    def _check_models_to_score_with(self, done: Collection[int]) -> None:
        """Refuse models that exist and cannot score, before phases take their time; the others come of those."""
        for index, phase in enumerate(self.recipe.phases):
            if phase.score is None or index in done:
                continue
            named = {
                f"phases.{index}.score.{k}_model": v
                for k, v in phase.score.models.items()
                if not v.startswith(OF_PHASE)
            }
            models = {key: model_folder(path, key) for key, path in named.items()}
            check_models(self.recipe.of_phase(index).data, models, tasks=phase.score.tasks)

    def _add(self, record: dict[str, Any]) -> None:
        self.result = replace(
            self.result,
            step=self.result.step + record["steps"],
            num_skipped=self.result.num_skipped + record["num_skipped"],
        )

    def _is_stopped(self) -> bool:
        level = torch.tensor(float(self.given.signals.level))
        return int(max_over_ranks(level)) != Stop.NOT_ASKED

    # Phases that are finished

    def _read_done(self) -> dict[int, dict[str, Any]]:
        """Return what is known of each finished phase, by index, equal on all ranks; refuse others than asked for."""
        began = self.group.broadcast(", ".join(folder.name for folder in phase_folders(self.run_dir)))
        if began and self.recipe.checkpoint.resume == "never":
            raise ConfigError(
                f"checkpoint.resume=never, but {self.run_dir} has phases that began ({began}); give another run_dir, "
                f"or type checkpoint.resume=auto to continue"
            )
        found: dict[int, dict[str, Any]] = {}
        for index in range(len(self.names)):
            path = self.handover.folder(index) / DONE
            text = self.group.broadcast(path.read_text(encoding="utf-8") if path.is_file() else "")
            if text:
                found[index] = json.loads(text)
        for index, record in found.items():
            self._check_done(index, record, found.keys())
        return found

    def _check_done(self, index: int, record: dict[str, Any], done: Any) -> None:
        folder = self.handover.folder(index)
        again = f"remove {folder} and the phases that come from it to do them again, or give another run_dir"
        changed = differences(record["asked"], self.recipe, index)
        if changed:
            raise ConfigError(f"{folder} is finished, and was asked for otherwise ({'; '.join(changed)}); {again}")
        source, _ = source_of(self.recipe.phases, index)
        if source is not None and source not in done:
            raise ConfigError(
                f"{folder} is finished, and {self.handover.folder(source)}, which it came from, is not there; {again}"
            )

    def _mark_done(self, index: int, record: dict[str, Any]) -> None:
        text = json.dumps({"asked": asked_of(self.recipe, index), **record}, indent=2) + "\n"
        self.group.on_first_rank(lambda: write_atomically(self.handover.folder(index) / DONE, text))


def _free_memory() -> None:
    """What is built next finds no memory taken by what came before."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
