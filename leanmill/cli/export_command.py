"""`leanmill export`: write a checkpoint in a format others load."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Export `args.checkpoint`; success is only reported after the copy was loaded and compared."""
    from leanmill.cli.checkpoints import resolve_checkpoint
    from leanmill.core.errors import ConfigError
    from leanmill.core.folders import check_is_new

    if args.to == "adapter" and args.packing != "none":
        raise ConfigError(f"--packing {args.packing} packs weights, and --to adapter writes none; use --to hf")
    if args.to == "adapter" and args.activations != "trained":
        raise ConfigError("--activations float is for --to hf: an adapter computes with the base it was trained beside")
    out = Path(args.out)
    check_is_new(out)
    checkpoint = resolve_checkpoint(args.checkpoint)
    if args.to == "adapter":
        from leanmill.export import export_adapter

        report = export_adapter(checkpoint, out)
    else:
        from leanmill.export import export_hf

        report = export_hf(checkpoint, out, packing=args.packing, activations=args.activations)
    print(f"exported {checkpoint} to {out.resolve()}, loaded it back and compared the logits")
    print(report)
    return 0
