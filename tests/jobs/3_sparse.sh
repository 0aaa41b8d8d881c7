# Make it 2:4 sparse with its dense self as the teacher, and see what that cost.
source "$(dirname "$0")/tiny.sh"
leanmill init sparse --template sparse --model models/base
leanmill train sparse/recipe.yaml $TINY run_dir=runs/sparse
leanmill export --checkpoint runs/sparse --to hf --out models/sparse
leanmill eval --checkpoint models/sparse --recipe sparse/recipe.yaml $SCORED
python - <<'P'
from safetensors.torch import load_file
weight = load_file("models/sparse/model.safetensors")["model.layers.0.mlp.up_proj.weight"]
assert ((weight.reshape(-1, 4) != 0).sum(-1) <= 2).all()
P
