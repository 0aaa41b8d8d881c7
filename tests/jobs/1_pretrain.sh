# Train a model from scratch, look at it, and write it as a plain Hugging Face folder.
source "$(dirname "$0")/tiny.sh"
leanmill init base
leanmill check base/recipe.yaml $TINY
leanmill plan base/recipe.yaml $TINY --rank-tflops 0.05 | tee plan.txt
grep -q "fits" plan.txt
grep -q "the run" plan.txt
leanmill launch base/recipe.yaml $TINY run_dir=runs/base data.tokenizer.vocab_size=512 model.config.vocab_size=512 --ranks 2
leanmill eval --checkpoint runs/base
leanmill export --checkpoint runs/base --to hf --out models/base
leanmill ckpt verify runs/base
test -s runs/base/report.html
