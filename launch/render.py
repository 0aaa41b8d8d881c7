"""Fill the job template of a cluster from a recipe: `python launch/render.py slurm recipe.yaml --nodes 4 ...`."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from string import Template

from leanmill.core.errors import ConfigError
from leanmill.recipe.io import load_recipe
from leanmill.recipe.root import Recipe
from leanmill.recipe.rules import micro_batches_of_step


HERE = Path(__file__).parent
TEMPLATES = {"slurm": HERE / "slurm" / "train.sbatch", "k8s": HERE / "k8s" / "pytorchjob.yaml"}
_FLIGHT_RECORDER_ENTRIES = 2000
_SIGNALS_TO_HANDLE = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""torchrun's own list, and SIGUSR1: without it that signal kills torchrun, and its ranks with it."""


def render(kind: str, recipe: Recipe, args: argparse.Namespace) -> str:
    """Return the filled template.

    Args:
        kind: `slurm` or `k8s`.
        recipe: The validated recipe; it gives the name, the run folder and the time-outs.
        args: The command line.

    Raises:
        ConfigError: The batch does not divide over these ranks, `--min-nodes` is above `--nodes`, or an `--env` is
            none.
    """
    min_nodes = args.nodes if args.min_nodes is None else args.min_nodes
    if not 1 <= min_nodes <= args.nodes:
        raise ConfigError(f"--min-nodes is {min_nodes}; give 1 to {args.nodes}, which --nodes is")
    for nodes in range(min_nodes, args.nodes + 1):
        _check_batch(recipe, nodes, args)
    return Template(TEMPLATES[kind].read_text(encoding="utf-8")).substitute(_values(kind, recipe, args))


def _check_batch(recipe: Recipe, nodes: int, args: argparse.Namespace) -> None:
    try:
        micro_batches_of_step(recipe, nodes * args.gpus_per_node)
    except ConfigError as error:
        if nodes == args.nodes:
            raise
        raise ConfigError(f"with {nodes} of {args.nodes} nodes: {error}; or raise --min-nodes") from error


def _environment(given: Sequence[str]) -> dict[str, str]:
    """Variables from `NAME=VALUE`."""
    pairs = [text.partition("=") for text in given]
    for text, (name, sign, _) in zip(given, pairs, strict=True):
        if not sign or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError(f"--env {text!r} is no NAME=VALUE; type e.g. --env NCCL_IB_HCA=mlx5")
    return {name: value for name, _, value in pairs}


def _values(kind: str, recipe: Recipe, args: argparse.Namespace) -> dict[str, str]:
    quote = shlex.quote
    run_dir = recipe.run_dir.format(name=recipe.name)
    min_nodes = args.nodes if args.min_nodes is None else args.min_nodes
    environment = _environment(args.env)
    numbers = {
        "nodes": args.nodes,
        "min_nodes": min_nodes,
        "gpus_per_node": args.gpus_per_node,
        "cpus_per_task": args.cpus_per_gpu * args.gpus_per_node,
        "memory_gib": args.memory_gib_per_gpu * args.gpus_per_node,
        "omp_threads": max(1, args.cpus_per_gpu // 2),
        "max_restarts": args.max_restarts,
        "warn_seconds": args.warn_seconds,
        "init_timeout_seconds": recipe.cluster.init_timeout_seconds,
        "step_timeout_seconds": recipe.cluster.step_timeout_seconds,
        "flight_recorder_entries": _FLIGHT_RECORDER_ENTRIES if recipe.cluster.flight_recorder else 0,
        "dump_on_timeout": int(recipe.cluster.flight_recorder),
    }
    texts = {
        "name": _job_name(recipe.name),
        "signals_to_handle": _SIGNALS_TO_HANDLE,
        "time_limit": args.time_limit,
        "node_range": f"{args.nodes}" if min_nodes == args.nodes else f"{min_nodes}-{args.nodes}",
        "environment": _exports(environment) if kind == "slurm" else _k8s_variables(environment),
        "flight_records": json.dumps(f"{args.run_mount}/flight_recorder/{_job_name(recipe.name)}/rank_"),
        "cache_mount": json.dumps(args.cache_mount),
        "cache_volume": f"persistentVolumeClaim: {json.dumps({'claimName': args.cache_claim})}"
        if args.cache_claim
        else "emptyDir: {}",
        "secrets": json.dumps([{"secretRef": {"name": name}} for name in args.secret]),
        "recipe": quote(args.recipe),
        "overrides": " ".join(map(quote, args.overrides)),
        # Stands inside double quotes in the script.
        "run_dir": re.sub(r'(["$`\\])', r"\\\1", run_dir),
        "image": json.dumps(args.image),
        "workdir": json.dumps(args.workdir),
        "run_mount": json.dumps(args.run_mount),
        "volume_claim": json.dumps(args.volume_claim),
        # A list of JSON strings is a YAML list: nothing to quote twice.
        "command": json.dumps(["torchrun", "launch/train.py", "--config", args.recipe, *args.overrides]),
    }
    return {key: str(value) for key, value in (numbers | texts).items()}


def _exports(environment: dict[str, str]) -> str:
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in environment.items())


def _k8s_variables(environment: dict[str, str]) -> str:
    lines = [f"- {{name: {name}, value: {json.dumps(value)}}}" for name, value in environment.items()]
    return "\n".join(f"{' ' * 16}{line}" for line in lines)


def _job_name(name: str) -> str:
    """Return a name that Slurm and Kubernetes accept (RFC 1123)."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:50].strip("-") or "leanmill"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=sorted(TEMPLATES), help="cluster")
    parser.add_argument("recipe", help="recipe file (YAML), as the job will see it")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key, e.g. train.steps=100")
    parser.add_argument("--nodes", type=int, required=True, help="machines")
    parser.add_argument("--gpus-per-node", type=int, required=True, help="GPUs of a machine, one rank each")
    parser.add_argument("--cpus-per-gpu", type=int, default=8, help="cores a rank gets (8)")
    parser.add_argument("--memory-gib-per-gpu", type=int, default=64, help="main memory a rank gets, GiB (64)")
    parser.add_argument(
        "--min-nodes",
        type=int,
        default=None,
        help="machines to go on with where fewer are free; the batch must divide over each number (--nodes)",
    )
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable for every rank, e.g. NCCL_IB_HCA=mlx5 or NCCL_SOCKET_IFNAME=eth0; repeat it for more",
    )
    parser.add_argument("--max-restarts", type=int, default=3, help="restarts of all workers after a failure (3)")
    parser.add_argument(
        "--warn-seconds",
        type=int,
        default=300,
        help="notice before a stop, and how long torchrun waits for the checkpoint (300)",
    )
    parser.add_argument("--time-limit", default="24:00:00", help="Slurm time limit (24:00:00)")
    parser.add_argument("--image", default="leanmill:latest", help="container image (k8s)")
    parser.add_argument("--workdir", default="/workspace/leanmill", help="folder of the clone in the image (k8s)")
    parser.add_argument("--run-mount", default="/workspace/leanmill/runs", help="where runs are mounted (k8s)")
    parser.add_argument("--volume-claim", default="leanmill-runs", help="volume claim for runs (k8s)")
    parser.add_argument("--cache-mount", default="/cache", help="where downloads of the hub are mounted (k8s)")
    parser.add_argument("--cache-claim", default=None, help="volume claim for them; none is a pod's own folder (k8s)")
    parser.add_argument(
        "--secret", action="append", default=[], help="a Secret whose keys become variables; repeat it for more (k8s)"
    )
    parser.add_argument("--out", help="file to write; stdout without it")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write one job file and return the exit code."""
    args = parse_args(argv)
    try:
        text = render(args.kind, load_recipe(args.recipe, args.overrides), args)
    except ConfigError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    if args.out is None:
        print(text, end="")
    else:
        Path(args.out).write_text(text, encoding="utf-8")
        print(f"wrote {args.out}; {'sbatch' if args.kind == 'slurm' else 'kubectl apply -f'} {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
