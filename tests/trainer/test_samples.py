"""What a model adds to prompts while it trains: transformers' own text, on every engine, at no cost to the training."""

import os

import pytest
import torch

from leanmill.checkpoint.reading import read_full_state
from leanmill.core.errors import ConfigError
from leanmill.data.config import TokenizerConfig
from leanmill.data.tokenizer import trained_tokenizer
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from leanmill.report.records import read_records
from leanmill.trainer.run import run
from leanmill.trainer.samples import Sampler
from tests.contract_training import recipe_of, train
from tests.data.samples import sentences, write_texts
from tests.distributed import run_ranks


PROMPTS = ["text 3: mill", "stone", "text 41: water wheel flour"]
ONE = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    config = TokenizerConfig(vocab_size=320)
    return trained_tokenizer(config, text_key="s", texts=lambda: iter(sentences(50)), root=root)


def recipe_with(prompts=PROMPTS, *, engine="single", techniques=("ternary",), task="pretrain", **evaluation):
    recipe = recipe_of(techniques, {"type": engine} if isinstance(engine, str) else engine, "", 1)
    raw = recipe.model_dump(mode="json")
    raw["model"]["config"] |= {"vocab_size": 340}  # larger than the tokenizer's
    raw["data"] |= {"sequence_length": 32, "task": task}
    if task == "sft":
        raw["data"]["source"] = {"type": "hf", "path": "chats.jsonl"}
    raw["batch"] = {"tokens_per_step": 128, "tokens_per_micro_batch": 64}
    raw["eval"] = {"prompts": prompts, "prompt_tokens": 12, **evaluation}
    return Recipe.model_validate(raw)


def sampled(recipe, tokenizer, ranks=ONE):
    engine, _ = train(recipe, ranks, num_steps=0)
    return Sampler(recipe, tokenizer)(engine), engine


def test_the_likeliest_tokens_are_those_that_transformers_generates(tokenizer):
    recipe = recipe_with(techniques=())
    samples, engine = sampled(recipe, tokenizer)
    model = engine.module.model.eval()
    model.lm_head.weight.data[len(tokenizer) :] = 0  # as if they were not there; Sampler leaves them out
    for prompt, sample in zip(PROMPTS, Sampler(recipe, tokenizer)(engine), strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = model.generate(
            ids, do_sample=False, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        assert sample.prompt == prompt
        assert sample.text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert len({sample.text for sample in samples}) == len(PROMPTS)


def test_draws_are_those_of_the_softmax_and_follow_seed_and_prompt(tokenizer):
    recipe = recipe_with(["stone"] * 3, temperature=1.0)
    first, _ = sampled(recipe, tokenizer)
    assert sampled(recipe, tokenizer)[0] == first
    assert len({sample.text for sample in first}) == 3
    sampler, logits = Sampler(recipe, tokenizer), torch.tensor([0.0, 1.0, 2.0]).repeat(4000, 1)
    sampler._vocab_size, sampler._num_new = 3, 1
    drawn = sampler._chosen(logits, range(4000), 0)
    shares = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(0), rtol=0, atol=0.03)


def _on_two_ranks(engine, tokenizer):
    rank = int(os.environ["RANK"])
    ranks = Ranks(rank=rank, world_size=2, local_rank=rank, device=torch.device("cpu"))
    samples, live = sampled(recipe_with(engine=engine, temperature=1.0, prompt_tokens=6), tokenizer, ranks)
    live.close()
    return samples


@pytest.mark.parametrize(
    "engine",
    [{"type": "fsdp"}, pytest.param({"type": "deepspeed", "stage": 3}, marks=pytest.mark.slow)],
    ids=["fsdp", "zero3"],
)
def test_ranks_share_the_prompts_and_sample_what_one_process_does(engine, tokenizer):
    expected, _ = sampled(recipe_with(temperature=1.0, prompt_tokens=6), tokenizer)
    assert run_ranks(_on_two_ranks, 2, engine, tokenizer) == [expected, expected]


def test_a_conversation_is_continued_behind_what_the_user_says(tokenizer):
    sampler = Sampler(recipe_with(["why"], task="sft"), tokenizer)
    text = tokenizer.decode(sampler._ids[0])
    assert text == tokenizer.apply_chat_template(
        [{"role": "user", "content": "why"}], tokenize=False, add_generation_prompt=True
    )


def test_a_prompt_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"eval\.prompts\.1 has \d+ tokens.*lower eval\.prompt_tokens"):
        Sampler(recipe_with(["a", "text 3: mill grain stone water wheel"], prompt_tokens=31), tokenizer)


def _trained(folder, name, **evaluation):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = Recipe(
        run_dir=str(folder / name),
        device="cpu",
        model={"config": {"model_type": "llama", "num_key_value_heads": 1, "attention_dropout": 0.5, **sizes}},
        data={
            "source": {"type": "hf", "path": str(folder / "a.jsonl"), "validation_fraction": 0.3},
            "tokenizer": {"vocab_size": 300},
            "sequence_length": 16,
            "cache_dir": str(folder / "cache"),
        },
        batch={"tokens_per_step": 64, "tokens_per_micro_batch": 32},
        train={"steps": 4, "precision": "fp32", "deterministic": True},
        eval={"tokens_per_domain": 32, "every_steps": 2, **evaluation},
        log={"tensorboard": False},
    )
    run(recipe)
    return read_full_state(folder / name / "checkpoints" / "step-00000004")


def test_prompts_leave_the_training_bitwise_as_it_was(tmp_path, capfd):
    write_texts(tmp_path / "a.jsonl", 60)
    without = _trained(tmp_path, "without")
    with_prompts = _trained(tmp_path, "with", prompts=["mill\n<b>"], prompt_tokens=6, temperature=1.0)
    assert without.keys() == with_prompts.keys()
    assert all(torch.equal(value, with_prompts[name]) for name, value in without.items())
    evals = [r for r in read_records(tmp_path / "with" / "metrics.jsonl") if r["kind"] == "eval"]
    assert [r["samples"][0]["prompt"] for r in evals] == ["mill\n<b>"] * 2
    assert "  > mill\\n<b> …" in capfd.readouterr().err
    page = (tmp_path / "with" / "report.html").read_text(encoding="utf-8")
    assert "Samples at step 4" in page
    assert "<b>mill\n&lt;b&gt;</b>" in page
    assert "Earlier samples" in page
