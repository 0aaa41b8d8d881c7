# Teach it to answer with LoRA, from conversations in a file, and write the adapter and the merged model.
source "$(dirname "$0")/tiny.sh"
leanmill init answers --template sft --model models/base
cd answers
# The model is no chat model yet: its tokenizer learns how a conversation is written.
cat > template.jinja <<'T'
{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}
T
SMALL="data.sequence_length=256 data.cache_dir=$PWD/cache batch.tokens_per_step=512 batch.tokens_per_micro_batch=512
  train.epochs=1 eval.tokens_per_domain=256 eval.every_steps=8 checkpoint.every_steps=8 device=cpu data.tokenizer.chat_template=template.jinja"
leanmill data preview recipe.yaml $SMALL | tee rows.txt
grep -q "list comprehension\|dictionary\|function" rows.txt
leanmill train recipe.yaml $SMALL run_dir=../runs/answers
cd ..
leanmill export --checkpoint runs/answers --to adapter --out models/adapter
leanmill export --checkpoint runs/answers --to hf --out models/answers
test -s models/adapter/adapter_model.safetensors
leanmill generate --model models/answers --prompt "What is a list?" --max-new-tokens 8
