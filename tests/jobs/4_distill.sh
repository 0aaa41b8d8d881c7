# Train a smaller student to imitate it.
source "$(dirname "$0")/tiny.sh"
leanmill init student --template distill --model models/base
leanmill train student/recipe.yaml $TINY run_dir=runs/student model.config.hidden_size=64 \
  model.config.intermediate_size=96 model.config.num_hidden_layers=2
leanmill export --checkpoint runs/student --to hf --out models/student
leanmill eval --checkpoint runs/student --json | tee student.json
test -s student.json
