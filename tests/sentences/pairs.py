"""Sentence pairs drawn from a seed, and a tiny encoder that trains on them through the real preparation and loop."""

import torch

from leanmill.models.build import build_on_meta
from leanmill.parallel.build import build_engine
from leanmill.recipe.root import Recipe
from leanmill.trainer.loop import Loop
from leanmill.trainer.prepare import prepare


VOCAB_SIZE, NUM_TEXTS, TEXT_LENGTH, NUM_ROWS, NUM_STEPS = 61, 3, 8, 8, 2
SEQUENCE_LENGTH = NUM_TEXTS * TEXT_LENGTH
BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def save_teacher(folder):
    """A wider encoder of the same vocabulary, with a pooler that nothing asks for."""
    from transformers import BertConfig, BertModel

    config = {key: value for key, value in BERT.items() if key != "model_type"}
    torch.manual_seed(3)
    BertModel(BertConfig(**{**config, "hidden_size": 40, "num_attention_heads": 4})).save_pretrained(folder)
    return str(folder)


class FixedPairs:
    """Rows of three texts; some lack the third, one step has a pair that occurs twice, and some have scores."""

    def __init__(self, *, num_micro_batches):
        generator = torch.Generator().manual_seed(7)
        count = NUM_STEPS * NUM_ROWS
        self.lengths = torch.randint(3, TEXT_LENGTH + 1, (count, NUM_TEXTS), generator=generator)
        self.lengths[::3, 2] = 0
        ids = torch.randint(4, VOCAB_SIZE, (count, NUM_TEXTS, TEXT_LENGTH), generator=generator)
        ids[3], self.lengths[3] = ids[1], self.lengths[1]
        ids = ids.masked_fill(torch.arange(TEXT_LENGTH) >= self.lengths[..., None], 0)
        self.ids, self.scores = ids.flatten(1), torch.full((count, 1), torch.nan)
        self.scores[5::7] = 0.25
        self.position_tokens, self.num_micro_batches = 0, num_micro_batches

    def next_rows(self, num_rows, *, rank, world_size):
        first = self.position_tokens // SEQUENCE_LENGTH
        self.position_tokens += num_rows * SEQUENCE_LENGTH
        part = torch.arange(first, first + num_rows).view(self.num_micro_batches, world_size, -1)[:, rank].flatten()
        lengths = self.lengths[part]
        labels = torch.full((len(part), SEQUENCE_LENGTH), -100)
        labels[:, 0] = 1
        return {
            "input_ids": self.ids[part],
            "labels": labels,
            "position_ids": torch.arange(TEXT_LENGTH).repeat(len(part), NUM_TEXTS),
            "token_mask": (torch.arange(TEXT_LENGTH) < lengths[..., None]).flatten(1),
            "text_lengths": lengths,
            "scores": self.scores[part],
            "row_ids": part,
        }


def recipe_of(techniques, engine, *, num_micro_batches, world_size, precision="fp32", model=None):
    tokens = NUM_ROWS * SEQUENCE_LENGTH
    return Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"task": "embedding", "config": {**BERT, **(model or {})}},
            "data": {
                "task": "sentence_pairs",
                "source": {"type": "hf", "path": "pairs.jsonl"},
                "num_negatives": NUM_TEXTS - 2,
                "sequence_length": SEQUENCE_LENGTH,
            },
            "techniques": techniques,
            "engine": engine,
            # A large eps keeps Adam from turning rounding noise in near-zero gradients into full steps.
            "optimizer": {"type": "adamw", "lr": 1e-2, "eps": 1e-3},
            "schedule": {"type": "constant", "warmup_steps": 0},
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // (num_micro_batches * world_size)},
            "train": {"steps": NUM_STEPS, "precision": precision, "max_grad_norm": 0.5},
        }
    )


def train(recipe, ranks, *, num_micro_batches, num_steps=NUM_STEPS):
    """Return the engine and each step's summed losses of this rank."""
    model = build_on_meta(recipe.model)
    engine, _ = build_engine(
        recipe.engine, ranks=ranks, precision=recipe.train.precision, model_bytes=0, layout=recipe.layout
    )
    prepared = prepare(recipe, model, engine, num_micro_batches=num_micro_batches)
    loop = Loop(
        recipe=recipe,
        engine=engine,
        data=FixedPairs(num_micro_batches=num_micro_batches),
        step_rules=prepared.techniques.step_rules,
        observers=(),
        num_steps=NUM_STEPS,
        num_micro_batches=num_micro_batches,
        save=lambda step: None,
        evaluate=lambda step: None,
    )
    loop.start()
    for _ in range(num_steps):
        loop.train_step()
        loop.step += 1
    return engine, loop


def full_parameters(engine):
    return {name: engine.full_parameter(name) for name, _ in engine.module.model.named_parameters()}
