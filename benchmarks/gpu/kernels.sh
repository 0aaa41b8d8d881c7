#!/usr/bin/env bash
# Kernels on one GPU, in under 10 minutes: their tests compiled instead of interpreted, then the table.
# Results land in $OUT, or in benchmarks/results without it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
timeout 240 python3 -m pytest tests/kernels -q -x --timeout 120 || echo "kernel tests failed with status $?"
(cd benchmarks/gpu && timeout 330 python3 kernels.py --out "${OUT:-../results}")
