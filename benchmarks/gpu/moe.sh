#!/usr/bin/env bash
# Mixtures of experts on one GPU, in under 10 minutes: grouped products and the MFU of a mixture beside a dense model.
# Results land in $OUT, or in benchmarks/results without it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
(cd benchmarks/gpu && timeout 570 python3 moe.py --out "${OUT:-../results}")
