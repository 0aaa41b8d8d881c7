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
from leanmill.cli.arguments import ADD_ARGUMENTS
from leanmill.core.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_RUN


_VERBS: dict[str, str] = {
    "init": "write a folder with a recipe to start from",
    "train": "train a recipe on one process (many: leanmill launch)",
    "launch": "train a recipe on all GPUs of this machine, through torchrun",
    "plan": "predict parameters, memory per rank, tokens and FLOPs without touching a device",
    "profile": "train a few steps and show what each module takes: time forward and backward, memory, communication",
    "check": "validate a recipe and explain it in plain words",
    "data": "show the rows that a recipe trains on, tokenise its data once for many runs, or score its documents",
    "methods": "list the techniques",
    "schema": "write the JSON schema of a recipe, for editors",
    "eval": "score a checkpoint or a model folder on held-out text",
    "evaluate": "put models to tasks beside a dense one: what compression cost, group by group",
    "compress": "prune, quantise or upcycle a model folder in one shot, a block in memory at a time",
    "arank": "print the rank of attention in each layer, low where mixture_of_depths may leave tokens out",
    "ticket": "print what each layer of a pruned, trained model owes to its values and to its mask",
    "export": "write a checkpoint as a Hugging Face or PEFT folder, and prove it loads",
    "merge": "merge LoRA adapters of one base into one, rank by rank",
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
        ADD_ARGUMENTS[name](verb)
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


if __name__ == "__main__":
    sys.exit(main())
