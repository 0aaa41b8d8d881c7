"""The `leanmill` command. Only argparse is imported here; a verb imports what it needs when it runs."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from leanmill import __version__
from leanmill.cli.argument_types import above_zero, gib, port, positive, seed, share, temperature
from leanmill.core.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_RUN


_VERBS: dict[str, str] = {
    "init": "write a folder with a recipe to start from",
    "train": "train a recipe on one process (many: leanmill launch)",
    "launch": "train a recipe on all GPUs of this machine, through torchrun",
    "plan": "predict parameters, memory per rank, tokens and FLOPs without touching a device",
    "check": "validate a recipe and explain it in plain words",
    "data": "show the rows that a recipe trains on, or tokenise its data once for many runs",
    "methods": "list the techniques",
    "schema": "write the JSON schema of a recipe, for editors",
    "eval": "score a checkpoint or a model folder on held-out text",
    "evaluate": "put models to tasks beside a dense one: what compression cost, group by group",
    "compress": "prune, quantise or upcycle a model folder in one shot, a block in memory at a time",
    "arank": "print the rank of attention in each layer, low where mixture_of_depths may leave tokens out",
    "export": "write a checkpoint as a Hugging Face or PEFT folder, and prove it loads",
    "generate": "continue a prompt with an exported folder on the CPU, packed weights staying packed",
    "report": "write the HTML report of a run, compare several, or watch one that goes on",
    "ckpt": "look into checkpoints, verify them, or write their tensors as plain files",
    "completion": "write a script with which a shell completes verbs and options",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from leanmill.core.redact import redact

        super().error(redact(message))


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; the arguments of a verb come from its module."""
    parser = _Parser(
        prog="leanmill", description="Train, fine-tune and compress small, sparse and low-bit language models."
    )
    parser.add_argument("--version", action="version", version=f"leanmill {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="verb", required=True)
    for name, summary in _VERBS.items():
        verb = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        _ADD_ARGUMENTS[name](verb)
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides may stand before, between and after options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # argparse fills a `*` positional once, so overrides behind an option are left over.
    strangers = [item for item in rest if item.startswith("-") or not hasattr(args, "overrides")]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)} (see leanmill {args.verb} --help)")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments without the program's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 (the run failed), 2 (the recipe or the arguments are wrong), 130 (interrupted).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name in letters that the terminal has not
    args = parse_args(argv)
    module = importlib.import_module(f"leanmill.cli.{args.verb}_command")
    return guarded(lambda: module.run(args), debug=args.debug)


def guarded(action: Callable[[], int], *, debug: bool) -> int:
    """Run `action`; turn what it raises into `error: ...` lines on stderr and an exit code.

    Args:
        action: Returns an exit code.
        debug: Print the traceback as well.
    """
    from leanmill.core.errors import ConfigError
    from leanmill.core.quiet import quiet_libraries
    from leanmill.core.redact import redact

    quiet_libraries()
    try:
        return action()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("error: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) left; a second failure at the flush on exit would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_RUN
    except Exception as error:
        if debug:
            import traceback

            print(redact(traceback.format_exc()), end="", file=sys.stderr)
        _tell(error, [redact(line) for line in _lines(error)])
        return EXIT_CONFIG if isinstance(error, ConfigError) else EXIT_RUN


def _tell(error: Exception, lines: Sequence[str]) -> None:
    """Print the `lines` of `error` on stderr, on one of the ranks that have them."""
    from leanmill.parallel import shared_errors

    rank = os.environ.get("RANK", "0")
    message = "\n".join(f"{'' if rank == '0' else f'[rank {rank}] '}error: {line}" for line in lines)
    key = "\n".join(lines)
    if shared_errors.is_told_by_its_cause(error):
        shared_errors.leave_when_told(cause_is_elsewhere=True)
    elif not message or not shared_errors.is_mine_to_tell(key):
        shared_errors.leave_when_told()
    else:
        print(message, file=sys.stderr, flush=True)
        shared_errors.write_error_file(message)
        shared_errors.linger(key)


_OS_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "; free space there, or write to another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "; change its permissions, or name another place"),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "; a file is in the way: remove it, or name another folder"),
    errno.ENAMETOOLONG: "; give shorter names",
}


_EXTRA_OF_PACKAGE = {
    "deepspeed": "deepspeed",
    "torchao": "lowbit",
    "compressed_tensors": "formats",
    "gguf": "formats",
    "wandb": "wandb",
    "shtab": "completion",
}


def _lines(error: Exception) -> list[str]:
    """Return the user's lines of an error; an unforeseen one says how to see more."""
    from leanmill.core.errors import ConfigError, RunError

    if isinstance(error, ConfigError | RunError):
        return [line for line in str(error).splitlines() if line.strip()]
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in _EXTRA_OF_PACKAGE:
        extra = _EXTRA_OF_PACKAGE[package]
        return [f"this needs the package {package}, which is not installed; type: pip install 'leanmill[{extra}]'"]
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        remedy = _OS_REMEDIES.get(error.errno or 0, "")
        return [f"{error.strerror}{f': {error.filename}' if error.filename else ''}{remedy}"]
    return [f"{type(error).__name__}: {text[:300]} (add --debug for the traceback)"]


def _init(parser: argparse.ArgumentParser) -> None:
    from leanmill.cli.init_command import DEFAULT_MODEL, TEMPLATES

    words = "; ".join(f"{name}: {template.summary}" for name, template in TEMPLATES.items())
    parser.add_argument("folder", help="folder to write; its name becomes the run's")
    parser.add_argument("--template", choices=list(TEMPLATES), default="pretrain", help=f"{words} (pretrain)")
    parser.add_argument(
        "--model", metavar="PATH", help=f"model to start from or learn from, a folder or hub name ({DEFAULT_MODEL})"
    )


def _launch(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--ranks", type=positive, metavar="N", help="processes of this machine (its GPUs; 1 where there is none)"
    )
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="machines that start this command (1)")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="where several machines meet")


def _ckpt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["inspect", "verify", "convert"], help="what to do")
    parser.add_argument("path", help="checkpoint folder, or a run_dir")
    parser.add_argument("--tensors", action="store_true", help="inspect: list every tensor of one checkpoint")
    parser.add_argument("--out", metavar="FOLDER", help="convert: where to write safetensors of whole tensors")


def _completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="shell to write it for")


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key, e.g. train.steps=100")


def _plan(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--nodes", type=positive, default=1, help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=positive, default=1, help="ranks of a machine (default 1)")
    parser.add_argument(
        "--rank-memory-gib",
        type=gib,
        metavar="GIB",
        help="memory of a rank: what the plan has to fit and `engine: auto` decides by (80)",
    )
    parser.add_argument(
        "--tokens-per-second",
        type=above_zero,
        metavar="R",
        help="measured, of all ranks together: says how long it takes",
    )
    parser.add_argument(
        "--rank-tflops", type=above_zero, metavar="T", help="or what a rank sustains, its peak times the MFU: 989 x 0.4"
    )
    parser.add_argument("--price-per-rank-hour", type=above_zero, metavar="P", help="says what that costs")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action", choices=["preview", "prepare"], help="preview: print the first rows; prepare: tokenise once to --out"
    )
    _recipe(parser)
    parser.add_argument("--rows", type=positive, default=3, metavar="N", help="rows to print (3)")
    parser.add_argument("--out", metavar="DIR", help="folder that prepare writes, or goes on with")
    parser.add_argument(
        "--shard-tokens", type=positive, default=1 << 26, metavar="N", help="tokens of a file that prepare writes"
    )


def _check(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[1, 2, 8], metavar="N", help="world sizes to explain (1 2 8)"
    )


def _schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="file to write; stdout without it")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint folder, a run_dir (its newest), or a Hugging Face folder"
    )
    parser.add_argument("--recipe", help="recipe (YAML) that says what a Hugging Face folder is scored on")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key of the checkpoint's recipe")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--routing",
        dest="studies_routing",
        action="store_true",
        help="study what a mixture of experts routes by, against the run's earlier checkpoints; for the report",
    )


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="DIR",
        help="run_dir (its newest checkpoint), checkpoint, Hugging Face folder or packed export; may be repeated",
    )
    parser.add_argument("--dense", metavar="DIR", help="what the models are held against; of the same kinds")
    parser.add_argument("--recipe", help="recipe (YAML) with `data` and `tasks`; without it local text and retrieval")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key of that recipe")
    parser.add_argument(
        "--bound",
        type=share,
        help="exit with 1 where a model loses more in any group: of an accuracy, or of bits a byte relative to dense",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", metavar="FILE", help="write the JSON there as well")


def _compress(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--out", required=True, help="folder to write")


def _arank(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--num-layers", type=positive, metavar="N", help="layers to name (half of them)")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a run_dir (its newest)")
    parser.add_argument(
        "--to", required=True, help="hf, hf_code, bitnet, packed, adapter, or a format of an installed package"
    )
    parser.add_argument(
        "--packing",
        default="none",
        help="how `--to hf` packs weights: none, bitnet, int2, int4, int8, ternary, binary, "
        "compressed_tensors, gguf, gguf_tq2_0, 2_4",
    )
    parser.add_argument(
        "--activations",
        choices=["trained", "float"],
        default="trained",
        help="float writes a model that trained with rounded activations without the rounding",
    )
    parser.add_argument(
        "--bits",
        dest="num_bits",
        type=positive,
        metavar="B",
        help="of weights that were trained in several widths (the recipe's)",
    )
    parser.add_argument("--out", required=True, help="folder to write")


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder that `leanmill export` wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="tokens to add (64)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=seed, default=0, help="of what a temperature draws (0)")
    parser.add_argument(
        "--beside-bf16", action="store_true", help="generate with the same weights in bf16 too, token by token in turn"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", metavar="run_dir", help="folder of a run; several are compared")
    parser.add_argument("--out", metavar="FILE", help="file of a comparison (comparison.html)")
    parser.add_argument("--live", action="store_true", help="serve the report to this machine while the run goes on")
    parser.add_argument("--port", type=port, default=8707, help="of --live at 127.0.0.1; 0 takes a free one (8707)")
    parser.add_argument(
        "--refresh-seconds", type=positive, default=10, metavar="S", help="between two loads of a --live page (10)"
    )


def _nothing(parser: argparse.ArgumentParser) -> None:
    """The verb has no arguments of its own."""


_ADD_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "init": _init,
    "train": _recipe,
    "launch": _launch,
    "plan": _plan,
    "check": _check,
    "data": _data,
    "methods": _nothing,
    "schema": _schema,
    "eval": _eval,
    "evaluate": _evaluate,
    "compress": _compress,
    "arank": _arank,
    "export": _export,
    "generate": _generate,
    "report": _report,
    "ckpt": _ckpt,
    "completion": _completion,
}


if __name__ == "__main__":
    sys.exit(main())
