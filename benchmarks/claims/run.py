"""Train every variant of every claim with several seeds, and say which orders the seeds resolve.

Runs that finished are not repeated: delete the folder to start anew. Results land in benchmarks/results, a folder a
kind of processor, and `python benchmarks/figures.py` makes the page of claims from them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from claims import CLAIMS, Bound, Variant

from leanmill.checkpoint.phases import phase_folder
from leanmill.recipe.io import load_recipe


FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "perf"))

from machine import conditions, write_result  # noqa: E402


NUM_SEEDS = 3

Task = tuple[str, str, int]
"""Claim, variant and seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CLAIMS), help=f"of {', '.join(CLAIMS)}; default all")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"), help="where runs go")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of a run; default the recipe's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args()
    overrides = [] if args.steps is None else [f"train.steps={args.steps}"]
    measured_under = conditions()
    tasks = [
        (name, variant, seed) for name in args.names for variant in CLAIMS[name].variants for seed in range(NUM_SEEDS)
    ]
    args.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        prepare(args.folder, tasks, overrides, pool)
        found = pool.map(lambda task: measure(args.folder, *task, overrides), tasks)
        measured = dict(zip(tasks, found, strict=True))
    for name in args.names:
        figures = figures_of(name, measured) | {"steps": num_steps(args.folder, name)}
        write_result(f"claims_{name}", figures, measured_under)


def prepare(folder: Path, tasks: Sequence[Task], overrides: Sequence[str], pool: Executor) -> None:
    """Make what several runs share: the corpus, its tokenizer, and models trained dense to start from."""
    bases = sorted({FOLDER / CLAIMS[name].base for name, _, _ in tasks})
    for base in bases:
        once = ["train.steps=1", "eval.tokens_per_domain=1024"]
        _train(folder / f"warm-up-{base.stem}", base, Variant(), 0, once)
    wanted = {
        (FOLDER / CLAIMS[name].base, seed)
        for name, variant, seed in tasks
        if CLAIMS[name].variants[variant].starts_trained
    }
    for base in {
        FOLDER / CLAIMS[name].base for name, variant, _ in tasks if CLAIMS[name].variants[variant].is_prepared
    }:
        _prepare(_prepared(folder, base), base)
    list(pool.map(lambda key: _train(_dense(folder, *key), key[0], Variant(), key[1], overrides), sorted(wanted)))


def figures_of(name: str, measured: Mapping[Task, Mapping[str, float]]) -> dict[str, Any]:
    """Return losses by variant and seed, the orders they have, and what the claim reads beside them."""
    claim = CLAIMS[name]

    def by_variant(metric: str) -> dict[str, list[float]]:
        metric, _, other = metric.partition(" / ")
        of = {
            variant: [measured[name, variant, seed][metric] for seed in range(NUM_SEEDS)] for variant in claim.variants
        }
        return (
            {variant: [a / b for a, b in zip(of[variant], of[other], strict=True)] for variant in of} if other else of
        )

    losses = by_variant(claim.reads)
    also = {what: by_variant(metric) for what, metric in claim.also.items()}
    bounds = [_bounded(bound, also[bound.what][bound.variant]) for bound in claim.bounds]
    return {"losses": losses, "orders": orders(losses), "also": also, "bounds": bounds}


def _bounded(bound: Bound, reached: Sequence[float]) -> dict[str, Any]:
    holds = all(value <= bound.limit for value in reached)  # what is no number does not
    return {**asdict(bound), "most": max(reached), "holds": holds}


def orders(losses: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return for each neighbour in the claimed order whether it is larger than what seeds differ in it.

    Runs of one seed start from the same weights and read the same rows, so variants are compared seed by seed.
    `holds` where the better one is lower in every seed, by more on average than its lead differs between seeds;
    `fails` where it is higher so; else `unresolved`.
    """
    names = list(losses)
    found = []
    for better, worse in zip(names, names[1:], strict=False):
        leads = [high - low for low, high in zip(losses[better], losses[worse], strict=True)]
        gap, spread = sum(leads) / len(leads), max(leads) - min(leads)
        is_resolved = abs(gap) > spread and not min(leads) <= 0 <= max(leads)
        verdict = ("holds" if gap > 0 else "fails") if is_resolved else "unresolved"
        found.append({"better": better, "worse": worse, "gap": gap, "spread": spread, "verdict": verdict})
    return found


def measure(folder: Path, name: str, variant: str, seed: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train or compress one variant; return its held-out loss and the metrics of its last step."""
    claim, given = CLAIMS[name], CLAIMS[name].variants[variant]
    run_dir = _run_dir(folder, name, variant, seed)
    base = FOLDER / claim.base
    if not given.starts_trained:
        trained = _train(run_dir, base, given, seed, overrides)
        return trained | ({} if given.target is None else _drafts(run_dir, base, given, seed))
    model = _exported(_dense(folder, base, seed))
    if given.passes:
        compressed = run_dir.with_name(f"{run_dir.name}-model")
        if not compressed.exists():
            _compress(model, base, given.passes, (), seed, compressed)
        model = compressed
    start = [f"model={{path: {model}}}", f"data.tokenizer.path={model}"]
    if not given.continues:
        return _evaluate(run_dir, base, seed, start)
    dense = _exported(_dense(folder, base, seed))
    techniques = json.dumps(given.techniques).replace("{dense}", str(dense))
    if given.beside is not None:
        beside = run_dir.with_name(f"{run_dir.name}-beside")
        if not beside.exists():
            _compress(dense, base, given.beside, (), seed, beside)
        techniques = techniques.replace("{beside}", str(beside))
    trained = _train(run_dir, base, replace(given, techniques=json.loads(techniques)), seed, [*start, *overrides])
    if given.afterwards is None:
        return trained
    compressed = run_dir.with_name(f"{run_dir.name}-afterwards")
    if not compressed.exists():
        exported = _exported(run_dir)
        _compress(exported, base, given.afterwards, given.overrides, seed, compressed)
    start = [f"model={{path: {compressed}}}", f"data.tokenizer.path={compressed}"]
    return _evaluate(run_dir.with_name(f"{run_dir.name}-compressed"), base, seed, [*start, *given.overrides])


def _drafts(run_dir: Path, base: Path, given: Variant, seed: int) -> dict[str, float]:
    """Return the share of what the last phase's model proposes that the model of its target does not accept."""
    found = run_dir / "drafts.json"
    if not found.exists():
        target = next(index for index, phase in enumerate(given.phases) if phase["name"] == given.target)
        folder = phase_folder(run_dir, target, str(given.target))
        data = load_recipe(base).data.model_dump(mode="json")
        tasks = [{"type": "speculative", "target": str(folder), "num_prompts": 64}]
        recipe = run_dir / "drafts.yaml"
        recipe.write_text(yaml.safe_dump({"seed": seed, "device": "cpu", "data": data, "tasks": tasks}), "utf-8")
        _leanmill("evaluate", "--recipe", str(recipe), "--model", str(_last_phase(run_dir, given)), "--out", str(found))
    (scores,) = json.loads(found.read_text(encoding="utf-8"))["models"].values()
    return {"rejected": 1 - next(one["value"] for one in scores if one["metric"] == "accepted")}


def _run_dir(folder: Path, name: str, variant: str, seed: int) -> Path:
    """Where one training goes: a name that stands in an override as it is."""
    return folder / f"{name}-{re.sub(r'[^A-Za-z0-9.+]+', '-', variant)}-{seed}"


def _evaluate(run_dir: Path, base: Path, seed: int, overrides: Sequence[str]) -> dict[str, float]:
    # Nothing moves at this rate: the run is there for its evaluation.
    return _train(run_dir, base, Variant(), seed, [*overrides, "train.steps=1", "optimizer.lr=1.0e-12"])


def _dense(folder: Path, base: Path, seed: int) -> Path:
    return folder / f"dense-{base.stem}-{seed}"


def _exported(run_dir: Path) -> Path:
    exported = run_dir / "exported"
    if not exported.exists():
        _leanmill("export", "--checkpoint", str(run_dir), "--to", "hf", "--out", str(exported))
    return exported


def _prepared(folder: Path, base: Path) -> Path:
    return folder / f"prepared-{base.stem}"


def _prepare(out: Path, base: Path) -> None:
    """Tokenise twice the corpus of the other claims, so that half of it is as long as one of their runs."""
    if not (out / "manifest.json").exists():
        size = 2 * load_recipe(base).data.source.max_bytes
        _leanmill("data", "prepare", str(base), f"data.source.max_bytes={size}", "--out", str(out))


def _compress(
    model: Path, base: Path, given: list[dict[str, Any]], overrides: Sequence[str], seed: int, out: Path
) -> None:
    data = load_recipe(base, [one for one in overrides if one.startswith("data.")]).data.model_dump(mode="json")
    data |= {"tokenizer": {"path": str(model)}}
    passes = {"seed": seed, "model": {"path": str(model)}, "data": data, "passes": given}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(passes), encoding="utf-8")
    _leanmill("compress", str(path), "--out", str(out))


def _train(run_dir: Path, base: Path, variant: Variant, seed: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train where that was not done before; return the last held-out loss, nats a token, and the last metrics."""
    measured = _last_phase(run_dir, variant)
    found = _measured(measured)
    if found is not None:
        return found
    given = [f"run_dir={run_dir}", f"seed={seed}", f"techniques={json.dumps(variant.techniques)}"]
    settings = [one.replace("{prepared}", str(_prepared(run_dir.parent, base).absolute())) for one in variant.settings]
    command = ["train"] if variant.num_ranks == 1 else ["launch", "--ranks", str(variant.num_ranks)]
    _leanmill(*command, str(base), *given, *settings, *overrides)
    found = _measured(measured)
    assert found is not None
    print(f"{run_dir.name}: {found['loss']:.4f}", flush=True)
    return found


def _last_phase(run_dir: Path, variant: Variant) -> Path:
    """Return the folder of what is measured: a run's own, or that of its last phase."""
    phases = variant.phases
    return phase_folder(run_dir, len(phases) - 1, phases[-1]["name"]) if phases else run_dir


def _measured(run_dir: Path) -> dict[str, float] | None:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return None
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(record["kind"] == "end" and record["status"] == "finished" for record in records):
        return None
    last = {record["kind"]: record for record in records}
    trained = [record["losses"]["cross_entropy"] for record in records if record["kind"] == "step"]
    own = {"loss": float(last["eval"]["domains"]["all"]["loss"]), "rise": rise(trained)}
    return {**last["step"]["metrics"], **last["eval"]["metrics"], **own}


def rise(losses: Sequence[float]) -> float:
    """Return by how much a loss rises above its least before, in means over tenths; NaN where it is once."""
    size = max(1, len(losses) // 10)
    means = [sum(part) / len(part) for first in range(0, len(losses), size) if (part := losses[first : first + size])]
    if any(math.isnan(mean) for mean in means):
        return math.nan
    return max((after - min(means[:place]) for place, after in enumerate(means) if place), default=0.0)


def num_steps(folder: Path, name: str) -> int:
    """Return how long a claim's models trained."""
    claim = CLAIMS[name]
    variant = next(iter(claim.variants))
    trained = claim.variants[variant].passes is None or claim.variants[variant].continues
    run_dir = _run_dir(folder, name, variant, 0) if trained else _dense(folder, FOLDER / claim.base, 0)
    run_dir = _last_phase(run_dir, claim.variants[variant])
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return int([record for record in records if record["kind"] == "step"][-1]["step"])


def _leanmill(*args: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", "leanmill", *args], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"leanmill {' '.join(args)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
