"""The parity matrix: every way of spreading a run over ranks, each to be held beside one process.

Another engine, layout, technique or value of an axis is one line. What the package refuses is no cell; its own
message says why.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from leanmill.core.errors import ConfigError
from leanmill.parallel.layout import resolve_layout
from leanmill.recipe.root import Recipe
from leanmill.trainer.parity.compare import FP32, FP64, Bounds
from tests import contract_models


SEQUENCE_LENGTH, NUM_ROWS, NUM_STEPS, MAX_NORM = 16, 12, 3, 0.1
"""Rows of a step make equal micro-batches of 1, 2 or 4 ranks and of 1 or 3 parts; every step is clipped."""

MODELS: dict[str, dict[str, Any]] = {
    "llama": contract_models.MODEL,
    "llama with heads to share": {**contract_models.MODEL, "num_attention_heads": 4, "num_key_value_heads": 2},
    "llama of four blocks": {**contract_models.MODEL, "num_hidden_layers": 4},
    "mixtral": contract_models.MODELS["mixtral"],
}
ENGINES: dict[str, dict[str, Any]] = {
    "single": {"type": "single"},
    "ddp": {"type": "ddp"},
    "fsdp": {"type": "fsdp"},
    "hsdp": {"type": "fsdp", "shard_size": 2},
    "zero1": {"type": "deepspeed", "stage": 1},
    "zero2": {"type": "deepspeed", "stage": 2},
    "zero3": {"type": "deepspeed", "stage": 3},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "ep2": {"ep": 2},
    "ep4": {"ep": 4},
    "experts sharded": {"experts": "fully_sharded"},
    "tp2": {"tp": 2},
    "tp2 tokens": {"tp": 2, "sequence_parallel": True},
    "cp2": {"cp": 2},
    "cp2 tp2": {"cp": 2, "tp": 2},
    "cp2 tp2 tokens": {"cp": 2, "tp": 2, "sequence_parallel": True},
    "pp2": {"pp": 2},
    "pp2 zbv": {"pp": 2, "pp_schedule": "zbv"},
    "pp4": {"pp": 4, "pp_schedule": "gpipe"},
    "cp2 gathered": {"cp": 2, "cp_attention": "all_gather"},
    "cp4 gathered": {"cp": 4, "cp_attention": "all_gather"},
    "cp2 by document": {"cp": 2, "cp_rows": "by_document"},
    "cp4 by document, gathered": {"cp": 4, "cp_rows": "by_document", "cp_attention": "all_gather"},
}
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "dense": [],
    "2:4": [{"type": "nm_sparsity", "gradient": "sr_ste", "decay": 1e-2}],
    "ternary": [{"type": "ternary"}],
    "lora": [{"type": "lora", "rank": 4}],
    "branch": [{"type": "lora", "rank": 4, "where": "branch", "targets": ["q_proj", "v_proj"]}],
    # Loads of the whole step, which do not depend on how it is cut.
    "balance": [{"type": "router_balance", "weight": 0.5, "estimator": "two_pass"}],
    "lsq": [{"type": "lsq", "weight_bits": 3, "activation_bits": 8}],
    "int4": [{"type": "int_quant", "weight_bits": 4, "activation_bits": 8}],
    "noise": [{"type": "neftune"}],
    "distill": [{"type": "distill", "teacher": "TEACHER", "weight": 0.5}],
}
"""One of each way in which a technique meets a layout: none, its own weights and masks, scales of whole weights,
adapters in the weight and beside it, a loss inside the model, learned and measured grids of both operands, noise by
place in the data, and another model beside it."""
ACCUMULATION = (1, 3)
RECOMPUTE = ("none", "selective", "full")
ROWS = ("whole", "packed")
"""One document a row, or several; ranks have unequal numbers of targets in both."""
PRECISIONS = ("fp64", "fp32", "bf16")

BOUNDS: dict[str, Bounds] = {
    "fp64": FP64,
    "fp32": FP32,
    # Another order of additions, rounded to 8 bits, which near the edge of a level takes another one; a wrong factor
    # is 50 % and more.
    "bf16": Bounds(loss=1e-2, gradient=0.3, norm=0.05, weight=0.3),
}

Precision = Literal["fp64", "fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the matrix."""

    world_size: int
    engine: str
    layout: str
    model: str
    technique: str
    accumulation: int
    recompute: str
    rows: str
    precision: str

    @property
    def key(self) -> str:
        """A name that tests and files use."""
        return (
            f"{self.world_size} {self.engine} {self.layout} {self.model} {self.technique} x{self.accumulation} "
            f"{self.recompute} {self.rows} {self.precision}"
        )

    @property
    def reference(self) -> Cell:
        """The cell on one process, at once, that it must equal."""
        alone = {"world_size": 1, "engine": "single", "layout": "dp", "accumulation": 1, "recompute": "none"}
        return Cell(**{**vars(self), **alone})


def recipe_of(cell: Cell, teacher: str) -> Recipe:
    """Return the recipe of a cell.

    Args:
        cell: The cell.
        teacher: Folder of a model with the same vocabulary.

    Raises:
        ConfigError: The package refuses it.
    """
    tokens = NUM_ROWS * SEQUENCE_LENGTH
    layout = LAYOUTS[cell.layout]
    data_size = cell.world_size // (layout.get("tp", 1) * layout.get("cp", 1) * layout.get("pp", 1))
    techniques = [
        {key: teacher if value == "TEACHER" else value for key, value in raw.items()}
        for raw in TECHNIQUES[cell.technique]
    ]
    recipe = Recipe.model_validate(
        {
            "device": "cpu",
            "model": {"config": MODELS[cell.model]},
            "data": {"sequence_length": SEQUENCE_LENGTH},
            "techniques": techniques,
            "engine": ENGINES[cell.engine],
            "layout": layout,
            # A large eps keeps Adam from turning rounding noise in near-zero gradients into full steps.
            "optimizer": {"type": "adamw", "lr": 1e-2, "eps": 1e-2},
            "schedule": {"type": "constant", "warmup_steps": 0},
            "batch": {
                "tokens_per_step": tokens,
                "tokens_per_micro_batch": tokens // (data_size * cell.accumulation),
            },
            "train": {
                "steps": NUM_STEPS,
                "precision": "bf16" if cell.precision == "bf16" else "fp32",
                "max_grad_norm": MAX_NORM,
                "activation_checkpointing": cell.recompute,
            },
        }
    )
    resolve_layout(recipe.layout, recipe.engine, cell.world_size)
    return recipe


def why_not(cell: Cell) -> str | None:
    """Return why there is no such cell; None where there is."""
    if (cell.engine == "single") != (cell.world_size == 1):
        return "one process is engine=single"
    if cell.world_size % math.prod(LAYOUTS[cell.layout].get(group, 1) for group in ("ep", "tp", "cp", "pp")):
        return "groups larger than the world"
    if cell.engine == "hsdp" and cell.world_size < 4 * LAYOUTS[cell.layout].get("tp", 1) * LAYOUTS[cell.layout].get(
        "pp", 1
    ):
        return "replicas of shards need 4 data ranks"
    if cell.precision == "fp64" and cell.engine.startswith("zero"):
        return "DeepSpeed's masters are fp32"
    if cell.precision == "fp64" and cell.technique == "balance":
        return "factors of balance losses are fp32"
    if cell.precision == "fp64" and cell.technique == "lsq":
        return "step sizes are fp32"
    try:
        recipe_of(cell, "teacher")
    except ValidationError as error:
        return " ".join(one["msg"].removeprefix("Value error, ") for one in error.errors()).replace("\n", "; ")
    except ConfigError as error:
        return str(error)
    return None


def all_cells(world_sizes: tuple[int, ...] = (1, 2, 4)) -> Iterator[Cell]:
    """Every combination, legal or not."""
    axes = (world_sizes, ENGINES, LAYOUTS, TECHNIQUES, ACCUMULATION, RECOMPUTE, ROWS, PRECISIONS)
    for world_size, engine, layout, technique, accumulation, recompute, rows, precision in itertools.product(*axes):
        spreads_experts = bool({"ep", "experts"} & LAYOUTS[layout].keys())
        dense = "llama with heads to share" if "tp" in LAYOUTS[layout] else "llama"
        dense = "llama of four blocks" if "pp" in LAYOUTS[layout] else dense
        yield Cell(
            world_size=world_size,
            engine=engine,
            layout=layout,
            model="mixtral" if spreads_experts or technique == "balance" else dense,
            technique=technique,
            accumulation=accumulation,
            recompute=recompute,
            rows=rows,
            precision=precision,
        )


def sizes_of(cell: Cell) -> dict[str, int]:
    """What a wrong factor may be, by name."""
    layout = LAYOUTS[cell.layout]
    shared = {name: size for name, size in layout.items() if isinstance(size, int)}
    data_size = cell.world_size // (layout.get("tp", 1) * layout.get("cp", 1) * layout.get("pp", 1))
    return {"data ranks": data_size, **shared, "micro-batches": cell.accumulation}
