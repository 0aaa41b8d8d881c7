# Sourced by each job: stops at the first error, and the sizes that let it end in seconds.
set -euo pipefail
SCORED="data.source.max_bytes=400000 data.cache_dir=$PWD/cache data.sequence_length=64 batch.tokens_per_step=512
  batch.tokens_per_micro_batch=256 eval.tokens_per_domain=1024 device=cpu"
TINY="$SCORED train.total_tokens=8192 eval.every_steps=8 checkpoint.every_steps=8"
