"""Train every variant of every claim with several seeds, and say which orders the seeds resolve.

Runs that finished are not repeated: delete the folder to start anew. Results land in benchmarks/results, a folder a
kind of processor, and `python benchmarks/figures.py` makes the page of claims from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from claims import CLAIMS, Variant


FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "perf"))

from machine import conditions, write_result  # noqa: E402


NUM_SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CLAIMS), help=f"of {', '.join(CLAIMS)}; default all")
    parser.add_argument("--folder", type=Path, default=Path("runs/claims"), help="where runs go")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps of a run; default the recipe's")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args()
    overrides = [] if args.steps is None else [f"train.steps={args.steps}"]
    measured_under, started = conditions(), time.time()
    tasks = [
        (name, variant, seed) for name in args.names for variant in CLAIMS[name].variants for seed in range(NUM_SEEDS)
    ]
    args.folder.mkdir(parents=True, exist_ok=True)
    # The corpus and its tokenizer are made once, before several runs would make them.
    _train(args.folder / "warm-up", Variant(), 0, ["train.steps=1", "eval.tokens_per_domain=1024"])
    if any(CLAIMS[name].variants[variant].passes is not None for name, variant, _ in tasks):
        with ThreadPoolExecutor(args.jobs) as pool:
            list(
                pool.map(
                    lambda seed: _train(args.folder / f"dense-{seed}", Variant(), seed, overrides), range(NUM_SEEDS)
                )
            )
    with ThreadPoolExecutor(args.jobs) as pool:
        losses = list(pool.map(lambda task: _loss(args.folder, *task, overrides), tasks))
    for name in args.names:
        found = {variant: [] for variant in CLAIMS[name].variants}
        for (of, variant, _), loss in zip(tasks, losses, strict=True):
            if of == name:
                found[variant].append(loss)
        figures = {"losses": found, "orders": orders(found), "steps": _steps(args.folder, name)}
        write_result(f"claims_{name}", figures, measured_under | {"seconds": round(time.time() - started)})


def orders(losses: dict[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Return for each neighbour in the claimed order whether it holds beyond the spread of the seeds.

    `holds` where every seed of the better variant is below every seed of the other, `fails` where it is the other
    way round, `unresolved` where they overlap.
    """
    names = list(losses)
    found = []
    for better, worse in zip(names, names[1:], strict=False):
        low, high = losses[better], losses[worse]
        verdict = "holds" if max(low) < min(high) else "fails" if min(low) > max(high) else "unresolved"
        gap = sum(high) / len(high) - sum(low) / len(low)
        found.append({"better": better, "worse": worse, "gap": gap, "verdict": verdict})
    return found


def _loss(folder: Path, claim: str, variant: str, seed: int, overrides: Sequence[str]) -> float:
    given = CLAIMS[claim].variants[variant]
    run_dir = folder / f"{variant.replace(' ', '-')}-{seed}"
    if given.passes is None:
        return _train(run_dir, given, seed, overrides)
    model = folder / f"{variant}-{seed}-model"
    if not model.exists():
        _compress(folder / f"dense-{seed}", given, seed, model)
    # Nothing moves at this rate: the run is there for its evaluation.
    unmoved = [f"model={{path: {model}}}", "train.steps=1", "optimizer.lr=1.0e-12", f"data.tokenizer.path={model}"]
    return _train(run_dir, Variant(), seed, unmoved)


def _compress(dense: Path, variant: Variant, seed: int, out: Path) -> None:
    exported = dense / "exported"
    if not exported.exists():
        _leanmill("export", "--checkpoint", str(dense), "--to", "hf", "--out", str(exported))
    base = yaml.safe_load((FOLDER / "base.yaml").read_text(encoding="utf-8"))
    data = base["data"] | {"tokenizer": {"path": str(exported)}}
    recipe = {"seed": seed, "model": {"path": str(exported)}, "data": data, "passes": variant.passes}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    _leanmill("compress", str(path), "--out", str(out))


def _train(run_dir: Path, variant: Variant, seed: int, overrides: Sequence[str]) -> float:
    """Train where that was not done before; return the last held-out loss, nats a token."""
    found = _scored(run_dir)
    if found is not None:
        return found
    given = [f"run_dir={run_dir}", f"seed={seed}", f"techniques={json.dumps(variant.techniques)}", *overrides]
    _leanmill("train", str(FOLDER / "base.yaml"), *given)
    loss = _scored(run_dir)
    assert loss is not None
    print(f"{run_dir.name}: {loss:.4f}", flush=True)
    return loss


def _scored(run_dir: Path) -> float | None:
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return None
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not any(record["kind"] == "end" and record["status"] == "finished" for record in records):
        return None
    return float([record for record in records if record["kind"] == "eval"][-1]["domains"]["all"]["loss"])


def _steps(folder: Path, claim: str) -> int:
    variant = next(iter(CLAIMS[claim].variants))
    run_dir = folder / ("dense-0" if CLAIMS[claim].variants[variant].passes else f"{variant.replace(' ', '-')}-0")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return int([record for record in records if record["kind"] == "step"][-1]["step"])


def _leanmill(*args: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-m", "leanmill", *args], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"leanmill {' '.join(args)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


if __name__ == "__main__":
    main()
