#!/usr/bin/env bash
# Everything that needs a GPU, in under 10 minutes: tests marked gpu, parity of CPU and GPU losses,
# tokens/s and MFU of a dense 1B model. Results land in $OUT, or in benchmarks/results without it.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python3 -m pytest -m gpu tests || [ $? -eq 5 ] # 5: no test carries the mark
python3 benchmarks/gpu/suite.py --out "${OUT:-benchmarks/results}"
