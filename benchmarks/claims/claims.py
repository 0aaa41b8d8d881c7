"""What the papers claim of their methods, as orders of held-out losses that a small model can be asked about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train, or to compress what was trained dense with the same seed."""

    techniques: list[dict[str, Any]] = field(default_factory=list)
    """`{dense}` in them is the folder of the model that was trained dense with the same seed, `{beside}` that of what
    `beside` made of it."""
    passes: list[dict[str, Any]] | None = None
    """For `leanmill compress`; None trains from the start of the recipe."""
    overrides: Sequence[str] = ()
    """Of the recipe."""
    continues: bool = False
    """Whether it trains again, the whole recipe, from the model that was trained dense and went through `passes`."""

    afterwards: list[dict[str, Any]] | None = None
    """For `leanmill compress`, on what `continues` has trained."""
    beside: list[dict[str, Any]] | None = None
    """For `leanmill compress`, on the model that was trained dense; the run does not begin with what comes of it."""
    phases: Sequence[Mapping[str, Any]] = ()
    """Of the recipe, each with a name; the last one is measured."""
    num_ranks: int = 1
    """Processes that it trains on from the start of the recipe."""
    target: str | None = None
    """Of `phases`, the one whose model accepts what the last one's proposes; `rejected` is then measured too."""

    @property
    def starts_trained(self) -> bool:
        """Whether it begins with the model that was trained dense."""
        return self.passes is not None or self.continues

    @property
    def is_prepared(self) -> bool:
        """Whether it trains on the larger corpus that is tokenised beforehand, `{prepared}` in overrides and phases."""
        return any("{prepared}" in one for one in self.settings)

    @property
    def settings(self) -> list[str]:
        """Every change of the recipe but the techniques."""
        return [*self.overrides, *([f"phases={json.dumps(list(self.phases))}"] if self.phases else [])]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What a variant stays below in every seed."""

    variant: str
    what: str
    """Of `Claim.also`."""
    limit: float


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Variants, best first."""

    says: str
    source: str
    variants: Mapping[str, Variant]
    base: str = "base.yaml"
    """The recipe that variants change."""
    reads: str = "loss"
    """What variants are ordered by, lower is better: held-out `loss`, or `rejected`, the share of a draft's proposals
    that its target did not accept."""
    also: Mapping[str, str] = field(default_factory=dict)
    """What is read beside losses: its name, and the metric in the last records, or `rise`: by how much the training
    loss, averaged over tenths of the run, rises above its least before; or `loss / ` and a variant, whose loss of the
    same seed it is divided by."""
    bounds: Sequence[Bound] = ()
    remark: str = ""
    """What we know of why it came out as it did."""


def _low_bit(bits: int) -> dict[str, Variant]:
    both = {"weight_bits": bits, "activation_bits": bits}
    return {
        f"quest W{bits}A{bits}": Variant(techniques=[{"type": "quest", **both}]),
        f"lsq W{bits}A{bits}": Variant(techniques=[{"type": "lsq", **both}]),
        f"straight-through W{bits}A{bits}": Variant(techniques=[{"type": "int_quant", **both}]),
    }


_2_4 = {"num_kept": 2, "group_size": 4}


def _one_shot(name: str) -> Variant:
    return Variant(passes=[{"type": name, **_2_4}])


_OFTEN_LOGGED = ["log.every_steps=10"]
_LSQ_1_BIT = {"weight_bits": 1, "grid": "midrise", "activation_bits": 1, "activation_grid": "midrise"}
_RISE = "rise of the training loss"


_RIGL = {"type": "rigl", "density": 0.1, "update_every_steps": 20}
_MASK_LLM = {"type": "mask_llm", **_2_4, "prior": "pruned", "prior_model": "{beside}"}


def _ticket(start: str) -> Variant:
    """A mask found in two rounds of pruning with rewinding, the weights of `start` in it, trained once more."""

    def pruned(name: str, sparsity: float, rewind_to: str) -> dict[str, Any]:
        passes = [{"type": "magnitude", "sparsity": sparsity}]
        overrides = {"techniques": [{"type": "static_mask"}]}
        return {"name": name, "passes": passes, "rewind_to": rewind_to, "overrides": overrides}

    return Variant(phases=[{"name": "dense"}, pruned("first", 0.6, "dense@22"), pruned("second", 0.84, start)])


def _sparse(group_size: int) -> dict[str, Variant]:
    one = {"type": "nm_sparsity", "num_kept": 1, "group_size": group_size}
    progressive = {"decay": "exponential", "dense_share": 0.1, "fine_tune_share": 0.2}
    return {
        "progressive gradient flow": Variant(techniques=[one | {"progressive": progressive}]),
        "sr-ste": Variant(techniques=[one]),
    }


_ALL_REDUCE, _OVER_ALL_REDUCE = "all-reduce in every step", "loss over that of an all-reduce"


def _four_workers(every_steps: int) -> Variant:
    low_comm = f"{{type: streaming_diloco, workers: 4, every_steps: {every_steps}}}"
    return Variant(num_ranks=4, overrides=[f"layout.low_comm={low_comm}", "batch.tokens_per_micro_batch=512"])


_PREPARED = ["data.source={type: prepared, path: '{prepared}'}"]


def _best(kept_share: float) -> Variant:
    """A model that trains on the share which a larger model finds easier than a smaller one."""

    def model(name: str, steps: int, **sizes: int) -> dict[str, Any]:
        return {"name": name, "start_from": "base", "overrides": {"train.steps": steps, "model.config": sizes}}

    teacher = model("teacher", 900, hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=6)
    teacher["overrides"]["model.config"]["num_key_value_heads"] = 6
    score = {"teacher_model": "phase:teacher", "reference_model": "phase:reference", "kept_share": kept_share}
    phases = [teacher, model("reference", 150, num_hidden_layers=2)]
    best = {"name": "best", "start_from": "base", "score": score, "overrides": {"train.steps": 450}}
    return Variant(phases=[*phases, best], overrides=_PREPARED)


_SMALL = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3}
_CUT = [{"type": "minitron", **_SMALL}]


_ROUTING = {"MaxVio": "experts/max_violation", "specialisation": "experts/specialisation"}
_WITH_BIAS = ["model.config.model_type=glm4_moe", "model.moe.num_shared_experts=1"]
"""A family with a bias on the choice of experts; it wants a shared one."""


def _balanced(scope: str, weight: float = 0.02, overrides: Sequence[str] = ()) -> Variant:
    balance = {"type": "router_balance", "weight": weight, "scope": scope}
    return Variant(techniques=[balance], overrides=overrides)


def _split(granularity: int, num_shared_experts: int) -> Variant:
    split = [f"model.moe.granularity={granularity}", f"model.moe.num_shared_experts={num_shared_experts}"]
    return Variant(techniques=_balanced("global_batch").techniques, overrides=split)


def _ternary_under(**schedule: Any) -> Variant:
    linear = {"type": "linear", "warmup_steps": 0.05, "min_factor": 0.0}
    return Variant(techniques=[{"type": "ternary"}], overrides=[f"schedule={json.dumps(linear | schedule)}"])


def _sparsegpt(share: float) -> dict[str, Any]:
    return {"type": "sparsegpt", "sparsity": share}


_EVOPRESS = {
    "type": "evopress",
    "levels": [_sparsegpt(share) for share in (0.5, 0.6, 0.7, 0.8, 0.9)],
    "sparsity": 0.7,
    "exchange": "any",
    "generations": 60,
    "offspring": 16,
    "selection": [
        {"survivors": 4, "tokens": 1024},
        {"survivors": 2, "tokens": 4096},
        {"survivors": 1, "tokens": 16384},
    ],
}


_TO_CPP = ["data.source.domains={cpp: 1.0}"]
"""What a model trained on Python is adapted to."""
_LORA_RANK = 32


def _adapted(*overrides: str, **technique: Any) -> Variant:
    return Variant(techniques=[technique], continues=True, overrides=[*_TO_CPP, *overrides])


_CORE_RATE = "optimizer.lr=6.0e-2"
"""Of adapters of few parameters, which want more than others: the best of 4e-3, 2e-2 and 6e-2 with seed 0."""


_LORA = _adapted(type="lora", rank=_LORA_RANK, alpha=_LORA_RANK)
"""327,680 parameters in the recipe's 28 linear layers."""


def _adapted_in_bits(bits: int) -> dict[str, Variant]:
    """A model of Python goes on with C++, as adapters, and is in a few bits at the end."""
    lora = {"type": "lora", "rank": 8, "alpha": 16}
    shared = {"weight_bits": bits, "granularity": "group", "group_size": 64}
    grid = {"type": "lsq", **shared, "weight_start": "l4q", "lr_factor": 0.02}
    overrides = [*_TO_CPP, "optimizer.lr=2.0e-3", "optimizer.weight_decay=0.0"]
    gptq = {"type": "gptq", "weight_bits": bits, "group_size": 64}
    return {
        "L4Q": Variant(techniques=[lora, grid], overrides=overrides, continues=True),
        "LoRA, then GPTQ": Variant(techniques=[lora], overrides=overrides, continues=True, afterwards=[gptq]),
    }


_MIXED = ["data.source.domains={python: 1.0, cpp: 1.0, english: 1.0}"]


def _on_three_domains(**technique: Any) -> Variant:
    return Variant(techniques=[technique], continues=True, overrides=_MIXED)


def _drafted(*own_text: Mapping[str, Any]) -> Variant:
    """A target, and a draft cut out of it that is distilled on the data, and on what it writes itself where asked."""
    distill = {"type": "distill", "teacher": "phase:target", "divergence": "forward_kl"}
    draft = {"train.cross_entropy_weight": 0, "optimizer.lr": 2.0e-3, "techniques": [*own_text, distill]}
    return Variant(
        target="target",
        phases=[
            {"name": "target", "overrides": {}},
            {
                "name": "cut",
                "passes": [{"type": "minitron", "intermediate_size": 0.34, "num_hidden_layers": 0.5}],
                "calibration": {"num_rows": 64},
            },
            {"name": "draft", "overrides": draft},
        ],
    )


CLAIMS: dict[str, Claim] = {
    "low_bit_w4a4": Claim(
        says="QuEST trains to a lower loss than LSQ, and LSQ than plain straight-through, at 4 bits",
        source="Panferov et al. 2025, arXiv:2502.05003",
        variants=_low_bit(4),
        remark="LSQ ends below the dense model as well (4.269, 4.291, 4.194), in training loss too, and so it does "
        "with 4-bit weights alone (seed 0: 4.022); with 8 bits (seed 0: 4.288) it does not. Its trained steps are a "
        "gain for each weight that the others lack, and in so short a run that is worth more than 4 bits cost; "
        "nothing is said of longer ones. These runs are in `claims_low_bit_w4a4_beside.json`.",
    ),
    "low_bit_w2a2": Claim(
        says="the same at 2 bits",
        source="Panferov et al. 2025, arXiv:2502.05003",
        variants=_low_bit(2),
    ),
    "low_bit_w1a1": Claim(
        says="QuEST trains with 1-bit weights and activations, its loss does not rise on the way, and ends below LSQ",
        source="Panferov et al. 2025, arXiv:2502.05003",
        variants={
            "quest W1A1": Variant(
                techniques=[{"type": "quest", "weight_bits": 1, "activation_bits": 1}], overrides=_OFTEN_LOGGED
            ),
            "lsq W1A1": Variant(techniques=[{"type": "lsq", **_LSQ_1_BIT}], overrides=_OFTEN_LOGGED),
        },
        also={_RISE: "rise"},
        bounds=[Bound(variant="quest W1A1", what=_RISE, limit=0.1)],
        remark="QuEST is stable, and so is LSQ, which ends lower in every seed, as at 4 bits and for what may be the "
        "same reason: each weight trains a step besides.",
    ),
    "trilm_schedule": Claim(
        says="ternary weights end lower with a lower peak in the second half and no weight decay in the last third",
        source="Kaushal et al. 2024, arXiv:2407.12327",
        variants={
            "TriLM schedule": _ternary_under(drop_at=0.5, drop_factor=2 / 3, weight_decay_until=2 / 3),
            "linear decay alone": _ternary_under(),
            "constant rate": _ternary_under(type="constant"),
        },
        remark="The schedule ends below a constant rate in every seed (by 0.034 to 0.048), and above the same linear "
        "decay without a drop and with weight decay to the end.",
    ),
    "one_shot_2_4": Claim(
        says="pruned to 2:4 in one shot, SparseGPT loses less than Wanda, and Wanda less than magnitude",
        source="Frantar and Alistarh 2023, arXiv:2301.00774; Sun et al. 2023, arXiv:2306.11695",
        variants={name: _one_shot(name) for name in ("sparsegpt", "wanda", "magnitude")},
    ),
    "learned_mask_2_4": Claim(
        says="weights as they are under a 2:4 mask that is learned (MaskLLM) lose less than SparseGPT's, which change",
        source="Fang et al. 2024, arXiv:2409.17481",
        variants={
            # The paper's 5e-4 over 2,000 steps is as far as 2.2e-3 over 450.
            "mask_llm": Variant(
                techniques=[_MASK_LLM],
                beside=[{"type": "sparsegpt", **_2_4}],
                continues=True,
                overrides=["optimizer.lr=2.2e-3", "schedule.warmup_steps=0"],
            ),
            "sparsegpt": _one_shot("sparsegpt"),
        },
    ),
    "evopress_70": Claim(
        says="pruned by SparseGPT to 70 % zeros over all layers, shares that EvoPress finds lose less than one for all",
        source="Sieberling et al. 2024, arXiv:2410.14649",
        variants={
            "evopress": Variant(passes=[_EVOPRESS]),
            "uniform": Variant(passes=[_sparsegpt(0.7)]),
        },
    ),
    "dynamic_sparsity_90": Claim(
        says="at 90 % zeros, masks that grow by gradients (RigL) end below masks that grow at random (SET), and those "
        "below masks at rest",
        source="Evci et al. 2020, arXiv:1911.11134; Mocanu et al. 2018, arXiv:1707.04780",
        variants={
            "rigl": Variant(techniques=[_RIGL]),
            "set": Variant(techniques=[{**_RIGL, "method": "set"}]),
            "static": Variant(techniques=[{**_RIGL, "drop_fraction": 0.0}]),
        },
        remark="All end below the dense model of the recipe (4.251 on average): so short a run does not favour many "
        "weights, and says little of what zeros cost.",
    ),
    "lottery_ticket": Claim(
        says="under a mask of 84 % zeros found by iterative pruning, weights of an early step train to a lower loss "
        "than those of the first step, and these than weights drawn anew",
        source="Frankle and Carbin 2019, arXiv:1803.03635; Frankle et al. 2020, arXiv:1912.05671",
        variants={
            "rewound to step 22": _ticket("dense@22"),
            "rewound to step 1": _ticket("dense@1"),
            "drawn anew": _ticket("fresh"),
        },
    ),
    "low_communication": Claim(
        says="four workers that send a fragment at a time and in 4 bits (Streaming DiLoCo) end within 1 % of an "
        "all-reduce in every step, at equal tokens",
        source="Douillard et al. 2025, arXiv:2501.18512",
        variants={
            _ALL_REDUCE: Variant(),
            "a fragment every 30 steps": _four_workers(30),
            "a fragment every 100 steps": _four_workers(100),
        },
        also={_OVER_ALL_REDUCE: f"loss / {_ALL_REDUCE}"},
        bounds=[
            Bound(variant=f"a fragment every {steps} steps", what=_OVER_ALL_REDUCE, limit=1.01) for steps in (30, 100)
        ],
    ),
    "progressive_1_8": Claim(
        says="keeping 1 of 8 weights, masks that come step by step (Progressive Gradient Flow) end below SR-STE",
        source="Bambhaniya et al. 2024, arXiv:2402.04744",
        variants=_sparse(8),
    ),
    "progressive_1_16": Claim(
        says="the same keeping 1 of 16",
        source="Bambhaniya et al. 2024, arXiv:2402.04744",
        variants=_sparse(16),
    ),
    "minitron": Claim(
        says="a model cut out of a larger one (Minitron) and distilled ends below one of its size from scratch",
        source="Muralidharan et al. 2024, arXiv:2407.14679",
        variants={
            "cut and distilled": Variant(
                techniques=[{"type": "distill", "teacher": "{dense}", "weight": 0.5}],
                passes=_CUT,
                continues=True,
                overrides=["train.cross_entropy_weight=0.5"],
            ),
            "cut": Variant(passes=_CUT, continues=True),
            "from scratch": Variant(
                overrides=[f"model.config.{name}={size}" for name, size in {**_SMALL, "head_dim": 32}.items()]
            ),
        },
        remark="At equal tokens of the small model: those that the larger one was trained on, the same corpus, are not "
        "counted, as the paper has it. Cut and distilled is below from scratch in every seed, and so is cut and "
        "trained without a teacher, by more: the larger model itself is at 4.251 on average, above where its students "
        "get to, so that imitating it holds them back here.",
    ),
    "miniplm": Claim(
        says="a model trained on the half that a teacher finds easier than a reference does (MiniPLM) ends below one "
        "trained on as much of the whole",
        source="Gu et al. 2024, arXiv:2410.17215",
        variants={"the best half": _best(0.5), "as much of all": Variant(overrides=_PREPARED)},
    ),
    "moe_balance_scope": Claim(
        says="experts balanced over the global batch end below experts balanced within each micro-batch",
        source="Qiu et al. 2025, arXiv:2501.11873",
        variants={
            "global batch": _balanced("global_batch"),
            "micro-batch": _balanced("micro_batch"),
        },
        base="moe.yaml",
        also=_ROUTING,
        remark="Experts balanced over the global batch specialise 1.6 to 4 times as much, in every seed and at a load "
        "as even, as the paper has it; in losses a run this short shows nothing of it. A micro-batch here is "
        "one sequence.",
    ),
    "moe_fine_grained": Claim(
        says="fine-grained experts, and one of them shared, end below as many weights in coarse ones",
        source="Dai et al. 2024, arXiv:2401.06066",
        variants={"fine-grained and shared": _split(4, 1), "fine-grained": _split(4, 0), "coarse": _split(1, 0)},
        base="moe.yaml",
        also=_ROUTING,
    ),
    "moe_bias_balance": Claim(
        says="a bias on the choice of experts balances them at a lower loss than a large auxiliary loss does",
        source="Wang et al. 2024, arXiv:2408.15664",
        variants={
            "bias": Variant(techniques=[{"type": "bias_balance", "rate": 0.01}], overrides=_WITH_BIAS),
            "auxiliary loss of weight 0.3": _balanced("global_batch", 0.3, _WITH_BIAS),
        },
        base="moe.yaml",
        also=_ROUTING,
    ),
    "l4q_3_bits": Claim(
        says="adapters inside of the quantiser end lower than adapters whose sum is rounded afterwards, at 3 bits",
        source="Jeon et al. 2024, arXiv:2402.04902",
        variants=_adapted_in_bits(3),
    ),
    "l4q_2_bits": Claim(
        says="the same at 2 bits",
        source="Jeon et al. 2024, arXiv:2402.04902",
        variants=_adapted_in_bits(2),
    ),
    "moe_upcycled": Claim(
        says="a trained model whose MLPs become experts goes on to a lower loss than itself, at equal tokens",
        source="He et al. 2024, arXiv:2410.07524",
        variants={
            "upcycled": Variant(
                techniques=_balanced("global_batch").techniques,
                passes=[{"type": "upcycle", "num_experts": 8, "top_k": 2}],
                continues=True,
            ),
            "continued dense": Variant(continues=True),
        },
        remark="Both read the corpus a second time, from the same dense model. At equal tokens: with 2 of 8 experts "
        "a token costs the upcycled model more.",
    ),
    "lean_full_rank": Claim(
        says="with AdamW's state of a part of the weights alone, GaLore and LISA adapt a model nearly as far as full "
        "fine-tuning does, and further than LoRA",
        source="Zhao et al. 2024, arXiv:2403.03507; Pan et al. 2024, arXiv:2403.17919",
        variants={
            "full fine-tuning": Variant(continues=True, overrides=_TO_CPP),
            # A quarter of the width, and one of four blocks at a time.
            "galore": _adapted(type="galore", rank=32, every_steps=50, scale=1.0),
            "lisa": _adapted(type="lisa", num_layers=1, every_steps=15),
            "lora, 328k": _LORA,
        },
        remark="AdamW's state in the last checkpoint: full fine-tuning 9.0 MB, GaLore 3.9 MB, LISA 3.8 MB (embedding "
        "and head train with both), LoRA 2.7 MB. GaLore is 0.17 above full fine-tuning, LISA 0.29, LoRA 0.94.",
    ),
    "lora_sb": Claim(
        says="LoRA-SB, with a 20th of LoRA's parameters, ends no higher than LoRA; LoRA-XS, of as many, does not",
        source="Ponkshe et al. 2024, arXiv:2411.19557",
        variants={
            # 28 cores of 24 x 24: 16,128 parameters. The step is the recipe's rate over its steps of warm-up.
            "lora-sb, 16k": _adapted(
                _CORE_RATE, type="peft", method="core_lora", variant="lora_sb", r=24, alpha=24, gradient_step=1.8e-4
            ),
            "lora, 328k": _LORA,
            "lora-xs, 16k": _adapted(_CORE_RATE, type="peft", method="core_lora", variant="lora_xs", r=24, alpha=24),
        },
        remark="LoRA-SB is below LoRA-XS in every seed (by 0.10), as the paper has it; neither comes near LoRA of "
        "twenty times as many parameters, for what is said of MoS below.",
    ),
    "mos": Claim(
        says="MoS, with an 8th of LoRA's parameters, ends no higher than LoRA; LoRA of as many does not",
        source="Wang et al. 2024, arXiv:2410.00938",
        variants={
            "mos, 41k": _adapted(type="peft", method="mos", r=32, pool_rank=4, num_shards=4, private_rank=1, alpha=32),
            "lora, 328k": _LORA,
            "lora, 41k": _adapted(type="lora", rank=4, alpha=4),
        },
        remark="MoS is below LoRA of as many parameters by 0.31 in every seed, and does not reach LoRA of eight "
        "times as many: a model of 1.8M that goes from Python to C++ has more to learn than 41,000 parameters hold.",
    ),
    "smora": Claim(
        says="on three domains at once, SMoRA ends below LoRA of as many ranks, and that below LoRA of as many as "
        "SMoRA uses for a token",
        source="Zhao et al. 2025, arXiv:2501.15103",
        variants={
            "smora, 8 of 64 ranks": _on_three_domains(
                type="peft",
                method="moe_lora",
                num_experts=64,
                r=1,
                top_k=8,
                alpha=8,
                normalise=True,
                balance="bias",
                bias_rate=1e-3,
            ),
            "lora, 64 ranks": _on_three_domains(type="lora", rank=64, alpha=64),
            "lora, 8 ranks": _on_three_domains(type="lora", rank=8, alpha=8),
        },
    ),
    "on_policy": Claim(
        says="a draft that is distilled on text of which it wrote half (DistillSpec, GKD) has more of its proposals "
        "accepted than one that is distilled on the data alone",
        source="Zhou et al. 2023, arXiv:2310.08461; Agarwal et al. 2023, arXiv:2306.13649",
        variants={
            "its own text and data": _drafted(
                {"type": "on_policy", "share": 0.5, "prompt_tokens": 32, "new_tokens": 32}
            ),
            "data alone": _drafted(),
        },
        reads="rejected",
        also={"held-out loss": "loss"},
    ),
}
