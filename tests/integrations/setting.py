"""One training of a tiny model, by our Trainer and by transformers'."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import leanmill
from leanmill.integrations import LeanmillCallback
from leanmill.parallel.launch import Ranks
from leanmill.recipe.root import Recipe
from tests.contract_training import train


VOCAB_SIZE, LENGTH, NUM_ROWS, NUM_STEPS, LR = 64, 16, 8, 20, 3e-3
"""Rows of a step; two micro-batches a rank."""


def llama(seed: int = 0, **changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=1, max_position_embeddings=32, **sizes | changes)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    # As if read from a folder in fp32: masters are.
    return model.float()


class Rows:
    """Rows of both trainers; the first targets of some rows are left out, so micro-batches differ in their number."""

    def __init__(self, num_steps: int = NUM_STEPS) -> None:
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(VOCAB_SIZE, (num_steps * NUM_ROWS, LENGTH + 1), generator=generator)
        self.labels = self.ids.clone()
        for row in range(len(self.ids)):
            self.labels[row, : 1 + (5 * row) % 13] = -100
        self.position_tokens = 0

    def next_rows(self, num_rows: int, *, rank: int, world_size: int) -> dict[str, Tensor]:
        """For our loop."""
        first = self.position_tokens // LENGTH
        self.position_tokens += num_rows * LENGTH
        part = torch.arange(first, first + num_rows).view(2, world_size, -1)[:, rank].flatten()
        return {
            "input_ids": self.ids[part, :-1],
            "labels": self.labels[part, 1:],
            "position_ids": torch.arange(LENGTH).expand(len(part), -1).contiguous(),
            "row_ids": part,
        }

    def dataset(self) -> list[dict[str, Tensor]]:
        """For transformers': the last token of a row is a target only, as in our rows."""
        return [
            {
                "input_ids": ids[:-1],
                "labels": labels[:-1],
                "shift_labels": labels[1:],
                "position_ids": torch.arange(LENGTH),
            }
            for ids, labels in zip(self.ids, self.labels, strict=True)
        ]


def ours(
    model_dir: Path, techniques: list[dict[str, Any]], num_steps: int = NUM_STEPS, *, engine: Any = "single"
) -> dict[str, Tensor]:
    """Weights after our Trainer's steps."""
    tokens = NUM_ROWS * LENGTH
    recipe = Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"path": str(model_dir)},
            "data": {"sequence_length": LENGTH},
            "techniques": techniques,
            "engine": engine,
            "optimizer": {"type": "adamw", "lr": LR, "eps": 1e-6, "weight_decay": 0.01},
            "schedule": {"type": "constant", "warmup_steps": 0},
            "batch": {"tokens_per_step": tokens, "tokens_per_micro_batch": tokens // 2},
            "train": {"steps": num_steps, "precision": "fp32", "max_grad_norm": 0.5},
            "log": {"watch": False},
        }
    )
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    engine, _ = train(recipe, ranks, num_steps=num_steps, data=Rows(num_steps))
    return {name: engine.full_parameter(name) for name, _ in engine.module.model.named_parameters()}


def trainer_of(
    model: Any,
    folder: Path,
    *,
    num_steps: int = NUM_STEPS,
    clips_late: bool = False,
    activations: Any = "trained",
    **arguments: Any,
) -> Any:
    """transformers' Trainer with the callback, of a model that something is attached to."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, model: Any = None) -> Any:
            if self.optimizer is None:  # DeepSpeed has dropped it
                self.optimizer = optimizer
            return self.optimizer

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": NUM_ROWS // (2 * world_size),
        "gradient_accumulation_steps": 2,
        "max_steps": num_steps,
        "learning_rate": LR,
        "weight_decay": 0.01,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0 if clips_late else 0.5,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_steps": 10,
    }
    attached = leanmill.integrations.attached_to(model)
    optimizer = attached.optimizer(lr=LR, weight_decay=0.01, eps=1e-6, betas=(0.9, 0.95))
    return InOrder(
        model,
        TrainingArguments(**given | arguments),
        train_dataset=Rows(num_steps).dataset(),
        optimizers=(optimizer, None),
        callbacks=[LeanmillCallback(model, max_grad_norm=0.5 if clips_late else None, activations=activations)],
    )
