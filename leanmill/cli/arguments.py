"""The arguments of every verb. Only argparse is imported here."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leanmill.cli.argument_types import above_zero, gib, port, positive, seed, share, temperature


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
    search = parser.add_argument_group("search for the fastest layout")
    search.add_argument(
        "--search",
        action="store_true",
        help="predict every engine, layout, micro-batch and recomputation that is legal; print the best as YAML",
    )
    search.add_argument(
        "--rates",
        default="h100",
        metavar="R",
        help="a100, h100, h200, b200, `measured` for this machine's, or a YAML file of rates (h100)",
    )
    search.add_argument("--rates-out", metavar="FILE", help="write the rates that were used there")
    search.add_argument("--matmul-tflops", type=above_zero, metavar="T", help="large matmuls of one rank")
    search.add_argument("--link-gb", type=above_zero, metavar="GB", help="GB/s of a rank inside its machine, one way")
    search.add_argument("--node-link-gb", type=above_zero, metavar="GB", help="GB/s of a rank to other machines")
    search.add_argument("--nvme-path", metavar="DIR", help="consider ZeRO-3 with its optimizer state on NVMe there")
    search.add_argument(
        "--show", type=positive, metavar="N", help="layouts to print, beside the first of each kind (8)"
    )


def _profile(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--steps", type=positive, default=4, metavar="N", help="steps that are timed (4)")
    parser.add_argument("--before", type=positive, default=2, metavar="N", help="steps before those (2)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", metavar="FILE", help="write the JSON there as well")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=["preview", "prepare", "score"],
        help="preview: print the first rows; prepare: tokenise once to --out; score: rate prepared documents to --out",
    )
    _recipe(parser)
    parser.add_argument("--rows", type=positive, default=3, metavar="N", help="rows to print (3)")
    parser.add_argument("--out", metavar="DIR", help="folder that prepare or score writes, or goes on with")
    parser.add_argument(
        "--teacher", dest="teacher_model", metavar="MODEL", help="model whose likelihood score compares"
    )
    parser.add_argument(
        "--reference", dest="reference_model", metavar="MODEL", help="smaller model that it is compared with"
    )
    parser.add_argument(
        "--shard-tokens", type=positive, default=1 << 26, metavar="N", help="tokens of a file that prepare writes"
    )


def _check(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument(
        "--ranks", type=positive, nargs="+", default=[1, 2, 8], metavar="N", help="world sizes to explain (1 2 8)"
    )
    parser.add_argument(
        "--parity",
        action="store_true",
        help="train a small model of the family on 1 process and on 2 or 4, and compare every gradient and weight",
    )


def _schema(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", help="file to write; stdout without it")


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", required=True, help="checkpoint folder, a run_dir (its newest), or a Hugging Face folder"
    )
    parser.add_argument("--recipe", help="recipe (YAML) that says what a Hugging Face folder is scored on")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="change a key of the checkpoint's recipe")
    _weights_gib(parser)
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


def _ticket(parser: argparse.ArgumentParser) -> None:
    _recipe(parser)
    parser.add_argument("--earlier", metavar="DIR", help="folder of the same model at the moment it was rewound to")
    parser.add_argument("--by", choices=("block", "layer"), default="block", help="what changes at a time (block)")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder, or a run_dir (its newest)")
    parser.add_argument(
        "--to", required=True, help="hf, hf_code, bitnet, packed, adapter, or a format of an installed package"
    )
    parser.add_argument(
        "--packing",
        default="none",
        help="how `--to hf` packs weights: none, bitnet, int2, int4, int8, ternary, binary, "
        "mxfp4, nvfp4, compressed_tensors, gguf, gguf_tq2_0, 2_4",
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


def _merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapters", nargs="+", help="adapter folders that PEFT or `export --to adapter` wrote")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--rank", type=positive, metavar="K", help="rank of the merged adapter (the adapters' largest)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the first centres of groups (0)")


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder that `leanmill export` wrote")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N", help="tokens to add (64)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument("--seed", type=seed, default=0, help="of what a temperature draws (0)")
    parser.add_argument(
        "--beside-bf16", action="store_true", help="generate with the same weights in bf16 too, token by token in turn"
    )
    _weights_gib(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def _weights_gib(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights-gib",
        type=gib,
        metavar="GIB",
        help="the most of the weights to hold, for models larger than memory; the others are read when they are used",
    )


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


ADD_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "init": _init,
    "train": _recipe,
    "launch": _launch,
    "plan": _plan,
    "profile": _profile,
    "check": _check,
    "data": _data,
    "methods": _nothing,
    "schema": _schema,
    "eval": _eval,
    "evaluate": _evaluate,
    "compress": _compress,
    "arank": _arank,
    "ticket": _ticket,
    "export": _export,
    "merge": _merge,
    "generate": _generate,
    "report": _report,
    "ckpt": _ckpt,
    "completion": _completion,
}
"""What gives a verb's parser its arguments, by verb."""
