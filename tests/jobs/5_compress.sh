# Prune it in one shot, pack it into 4 bits, and run that on the CPU.
source "$(dirname "$0")/tiny.sh"
leanmill init pruned --template compress --model models/base
leanmill compress pruned/recipe.yaml data.source.max_bytes=400000 data.sequence_length=64 calibration.num_rows=8 \
  data.cache_dir=$PWD/cache device=cpu --out models/pruned
leanmill generate --model models/pruned --prompt "def main" --max-new-tokens 8
leanmill init lowbit --template sparse --model models/base
leanmill train lowbit/recipe.yaml $TINY run_dir=runs/lowbit \
  'techniques=[{type: int_quant, weight_bits: 4, granularity: group, group_size: 32}]'
leanmill export --checkpoint runs/lowbit --to hf --packing int4 --out models/int4
leanmill generate --model models/int4 --prompt "def main" --max-new-tokens 8
