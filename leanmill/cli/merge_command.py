"""`leanmill merge`: merge LoRA adapters of one base into one."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """Merge the adapters in `args.adapters` into `args.out`."""
    from leanmill.peft_ext.lego.folders import merge_adapters

    report = merge_adapters(args.adapters, args.out, rank=args.rank, seed=args.seed)
    print(f"wrote {args.out}: {report}")
    return 0
