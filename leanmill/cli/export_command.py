"""`leanmill export`: write a checkpoint in a format others load."""

from __future__ import annotations

import argparse
from pathlib import Path


def run(args: argparse.Namespace) -> int:
    """Export `args.checkpoint`; success is only reported after the copy was loaded and compared."""
    from leanmill.cli.checkpoints import resolve_checkpoint
    from leanmill.core.folders import check_is_new
    from leanmill.export import export_model
    from leanmill.export.formats import format_class

    out = Path(args.out)
    check_is_new(out)
    format_class(args.to, args.packing)
    checkpoint = resolve_checkpoint(args.checkpoint)
    report = export_model(
        checkpoint, out, to=args.to, packing=args.packing, activations=args.activations, num_bits=args.num_bits
    )
    print(f"exported {checkpoint} to {out.resolve()}, loaded it back and compared")
    print(report)
    return 0
