"""The one table of technique names. Values are strings, so listing them imports nothing.

Beside Leanmill's own, techniques come from installed packages, through the entry-point group
`leanmill.techniques` (name = "module:Class"), and from modules that a recipe lists in `plugins`, each of
which has a table `TECHNIQUES` like the one here.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leanmill.core.errors import ConfigError
from leanmill.core.near import near_names
from leanmill.core.passes import PassConfig
from leanmill.core.technique import TechniqueConfig


@dataclass(frozen=True)
class Entry:
    """Where a technique lives and what it is."""

    target: str
    """`module:Class`, imported when a recipe asks for it; importing it must not import torch."""
    summary: str
    paper: str
    unasked: bool = False
    """Whether it is installed without being listed, on models that it has something to look at in."""


TECHNIQUES: dict[str, Entry] = {
    "nm_sparsity": Entry(
        "leanmill.sparse.nm_sparsity.config:NMSparsity",
        "keep N of every M weights along the contraction dim: SR-STE, Progressive Gradient Flow",
        "Zhou et al. 2021, arXiv:2102.04010; Bambhaniya et al. 2024, arXiv:2402.04744",
    ),
    "ternary": Entry(
        "leanmill.quant.ternary.config:Ternary",
        "weights in {-s, 0, s}: absmean (BitNet b1.58), TWN or MSE-optimal scale",
        "Ma et al. 2024, arXiv:2402.17764; Li et al. 2016, arXiv:1605.04711",
    ),
    "binary": Entry(
        "leanmill.quant.binary.config:Binary",
        "weights in {-s, s}: signs and the mean magnitude (BitNet, XNOR-Net), several bases, PB-LLM, BiPer",
        "Wang et al. 2023, arXiv:2310.11453; Rastegari et al. 2016, arXiv:1603.05279",
    ),
    "dual_binary": Entry(
        "leanmill.quant.dual_binary.config:DualBinary",
        "weights of 2 bits as two binaries with a trained scale each (DB-LLM)",
        "Chen et al. 2024, arXiv:2402.11960",
    ),
    "int_quant": Entry(
        "leanmill.quant.int_quant.config:IntQuant",
        "integer weights and activations of 2 to 8 bits, absmax or MSE scale, straight-through",
        "Jacob et al. 2018, arXiv:1712.05877",
    ),
    "fp_quant": Entry(
        "leanmill.quant.fp_quant.config:FpQuant",
        "weights and activations in small floating-point formats: MXFP4 to MXFP8, NVFP4, FP4 with a searched bias",
        "Rouhani et al. 2023, arXiv:2310.10537; Liu et al. 2023, arXiv:2310.16836; Lee et al. 2024, arXiv:2405.18710",
    ),
    "sharpness": Entry(
        "leanmill.quant.sharpness.config:Sharpness",
        "log how much the loss can rise where logits move a little, which shows how stable training in few bits is",
        "Keskar et al. 2017, arXiv:1609.04836; Lee et al. 2024, arXiv:2405.18710",
    ),
    "lsq": Entry(
        "leanmill.quant.lsq.config:Lsq",
        "weights and activations of 1 to 8 bits with learned step sizes and offsets: LSQ, LSQ+",
        "Esser et al. 2020, arXiv:1902.08153; Bhalgat et al. 2020, arXiv:2004.09576",
    ),
    "pv_tuning": Entry(
        "leanmill.quant.pv_tuning.config:PvTuning",
        "few-bit codes that move a few at a time, and their levels by gradient",
        "Malinovskii et al. 2024, arXiv:2405.14852",
    ),
    "paretoq": Entry(
        "leanmill.quant.paretoq.config:ParetoQ",
        "weights of 1, 1.58, 2, 3 or 4 bits, one learned scale a row, for each the grid that suits it",
        "Liu et al. 2025, arXiv:2502.02631",
    ),
    "quest": Entry(
        "leanmill.quant.quest.config:Quest",
        "weights and activations of 1 to 8 bits through a Hadamard transform, trust gradient",
        "Panferov et al. 2025, arXiv:2502.05003",
    ),
    "static_mask": Entry(
        "leanmill.sparse.static_mask.config:StaticMaskConfig",
        "train what a pruned model has left, its zeros stay",
        "Han et al. 2015, arXiv:1506.02626",
    ),
    "perp": Entry(
        "leanmill.sparse.perp.config:Perp",
        "retrain biases, norms and masked adapters of a pruned model, everything else rests",
        "Zimmer et al. 2023, arXiv:2312.15230",
    ),
    "bdwp": Entry(
        "leanmill.sparse.bdwp.config:Bdwp",
        "N:M masks of their own for the forward and the backward matmul",
        "Fang et al. 2023, arXiv:2309.13015",
    ),
    "mask_llm": Entry(
        "leanmill.sparse.mask_llm.config:MaskLlm",
        "learn which N of every M weights to keep, the weights frozen",
        "Fang et al. 2024, arXiv:2409.17481",
    ),
    "rigl": Entry(
        "leanmill.sparse.rigl.config:Rigl",
        "sparse from start to end, masks that drop and grow weights: RigL, SET",
        "Evci et al. 2020, arXiv:1911.11134; Mocanu et al. 2018, arXiv:1707.04780",
    ),
    "gradual_pruning": Entry(
        "leanmill.sparse.gradual_pruning.config:GradualPruning",
        "prune ever more while training: weights, blocks, rows or columns, in each layer or over all",
        "Zhu and Gupta 2017, arXiv:1710.01878",
    ),
    "early_ticket": Entry(
        "leanmill.sparse.early_ticket.config:EarlyTicket",
        "prune at once, as soon as what would be pruned has settled",
        "You et al. 2020, arXiv:1909.11957",
    ),
    "lora_prune": Entry(
        "leanmill.sparse.lora_prune.config:LoraPrune",
        "mask more and more heads and neurons while lora trains, by the gradients of its factors",
        "Zhang et al. 2023, arXiv:2305.18403",
    ),
    "learned_threshold": Entry(
        "leanmill.sparse.learned_threshold.config:LearnedThresholdConfig",
        "prune what lies below a threshold of its row, which is trained",
        "Liu et al. 2020, arXiv:2005.06870",
    ),
    "lora": Entry(
        "leanmill.peft_ext.lora.config:Lora",
        "low-rank adapters, inside the weight or as an output branch through PEFT",
        "Hu et al. 2021, arXiv:2106.09685",
    ),
    "peft": Entry(
        "leanmill.peft_ext.peft.config:Peft",
        "an adapter of any method of Hugging Face PEFT (VeRA, OFT, DoRA, ...), LoRA-XS, LoRA-SB, MoSLoRA, MoS, NOLA",
        "Mangrulkar et al. 2022, github.com/huggingface/peft",
    ),
    "side_network": Entry(
        "leanmill.peft_ext.side_network.config:SideNetworkTechnique",
        "a network beside the frozen model that reads its hidden states, no gradient through the blocks: UniPT, SHERL",
        "Diao et al. 2023, arXiv:2308.14316; Diao et al. 2024, arXiv:2407.07523",
    ),
    "welore": Entry(
        "leanmill.peft_ext.welore.config:WeLoreTuning",
        "train the weights that the pass of this name made pairs of factors, the others rest",
        "Jaiswal et al. 2024, arXiv:2407.11239",
    ),
    "ba_lora": Entry(
        "leanmill.peft_ext.ba_lora.config:BaLora",
        "three regularisers beside any adapter: near the original model, diverse predictions, few strong directions",
        "Chang et al. 2024, arXiv:2408.04556",
    ),
    "lisa": Entry(
        "leanmill.peft_ext.lisa.config:Lisa",
        "train a few layers at a time, drawn anew every few steps: LISA, OwLore",
        "Pan et al. 2024, arXiv:2403.17919; Li et al. 2024, arXiv:2405.18380",
    ),
    "galore": Entry(
        "leanmill.peft_ext.galore.config:GaLore",
        "train weights through the leading subspace of their gradients, found anew every so often; Natural GaLore",
        "Zhao et al. 2024, arXiv:2403.03507; Das 2024, arXiv:2410.16029",
    ),
    "peqa": Entry(
        "leanmill.peft_ext.peqa.config:Peqa",
        "weights rounded to integers of 2 to 8 bits once, of which the scales alone train (PEQA)",
        "Kim et al. 2023, arXiv:2305.14152",
    ),
    "distill": Entry(
        "leanmill.distill.logits.config:Distill",
        "match a frozen teacher's next-token distribution",
        "Hinton et al. 2015, arXiv:1503.02531",
    ),
    "hidden_distill": Entry(
        "leanmill.distill.hidden.config:HiddenDistill",
        "match a frozen teacher's hidden states in chosen layers",
        "Jiao et al. 2019, arXiv:1909.10351",
    ),
    "on_policy": Entry(
        "leanmill.distill.on_policy.config:OnPolicy",
        "distils on continuations that the student writes itself",
        "Agarwal et al. 2023, arXiv:2306.13649; Zhou et al. 2023, arXiv:2310.08461",
    ),
    "relation_distill": Entry(
        "leanmill.distill.relations.config:RelationDistill",
        "match how a frozen teacher's queries, keys and values relate to each other",
        "Wang et al. 2020, arXiv:2012.15828",
    ),
    "contrastive": Entry(
        "leanmill.sentences.contrastive.config:Contrastive",
        "vectors of texts: tell the text that belongs to another from all others of the batch",
        "van den Oord et al. 2018, arXiv:1807.03748; Gao et al. 2021, arXiv:2101.06983",
    ),
    "embedding_distill": Entry(
        "leanmill.sentences.embedding_distill.config:EmbeddingDistill",
        "match a frozen teacher's vectors of texts",
        "Reimers and Gurevych 2020, arXiv:2004.09813",
    ),
    "layernorm_scaling": Entry(
        "leanmill.architecture.layernorm_scaling.config:LayerNormScaling",
        "scale the norms before attention and MLP by 1 / sqrt(depth)",
        "Sun et al. 2025, arXiv:2502.05795",
    ),
    "neftune": Entry(
        "leanmill.architecture.neftune.config:NefTune",
        "noise on the embeddings of tokens in training (NEFTune)",
        "Jain et al. 2023, arXiv:2310.05914",
    ),
    "layer_metrics": Entry(
        "leanmill.architecture.layer_metrics.config:LayerMetrics",
        "log each decoder block's norm of weights and share of the gradient",
        "none: a look at a run",
    ),
    "stochastic_depth": Entry(
        "leanmill.architecture.stochastic_depth.config:StochasticDepth",
        "drop blocks at random in training, with losses at early exits (LayerSkip)",
        "Huang et al. 2016, arXiv:1603.09382; Elhoushi et al. 2024, arXiv:2404.16710",
    ),
    "multi_token": Entry(
        "leanmill.architecture.multi_token.config:MultiToken",
        "predict further tokens too, each by a block of its own behind the model (MTP)",
        "DeepSeek-AI 2024, arXiv:2412.19437",
    ),
    "rho1": Entry(
        "leanmill.distill.rho1.config:Rho1",
        "train on the tokens whose loss exceeds a reference model's most",
        "Lin et al. 2024, arXiv:2404.07965",
    ),
    "dpo": Entry(
        "leanmill.preference.dpo.config:Dpo",
        "prefer the chosen of two answers to a prompt: DPO, IPO, SLiC's hinge, robust DPO",
        "Rafailov et al. 2023, arXiv:2305.18290; Azar et al. 2023, arXiv:2310.12036",
    ),
    "kto": Entry(
        "leanmill.preference.kto.config:Kto",
        "tell wanted from unwanted answers, each by itself (KTO)",
        "Ethayarajh et al. 2024, arXiv:2402.01306",
    ),
    "mixture_of_depths": Entry(
        "leanmill.moe.mixture_of_depths.config:MixtureOfDepths",
        "run decoder blocks for the tokens that a router chooses: gamma-MoD, p-MoD",
        "Luo et al. 2024, arXiv:2410.13859; Zhang et al. 2024, arXiv:2412.04449",
    ),
    "router_tuning": Entry(
        "leanmill.moe.router_tuning.config:RouterTuning",
        "train routers that skip attention for whole sequences, the model frozen (MindSkip)",
        "He et al. 2024, arXiv:2410.13184",
    ),
    "router": Entry(
        "leanmill.moe.router.config:Router",
        "options of routers: jitter, capacity and drops, groups, expert choice, masks by token frequency",
        "Fedus et al. 2021, arXiv:2101.03961; Zhou et al. 2022, arXiv:2202.09368; Su et al. 2024, arXiv:2407.09816",
    ),
    "stgc": Entry(
        "leanmill.moe.stgc.config:Stgc",
        "route tokens away from experts whose gradients theirs conflict with (STGC)",
        "Yang et al. 2024, arXiv:2406.19905",
    ),
    "router_balance": Entry(
        "leanmill.moe.router_balance.config:RouterBalance",
        "keep experts equally loaded: load-balance loss over sequence, micro-batch or global batch, router z-loss",
        "Fedus et al. 2021, arXiv:2101.03961; Qiu et al. 2025, arXiv:2501.11873",
    ),
    "bias_balance": Entry(
        "leanmill.moe.bias_balance.config:BiasBalance",
        "keep experts equally loaded: a bias on their choice that follows loads, without a loss",
        "Wang et al. 2024, arXiv:2408.15664",
    ),
    "matformer": Entry(
        "leanmill.moe.matformer.config:MatFormer",
        "nested MLPs: the first neurons are trained to do without the others",
        "Devvrit et al. 2023, arXiv:2310.07707",
    ),
    "moe_metrics": Entry(
        "leanmill.moe.moe_metrics.config:MoeMetrics",
        "log loads of experts, how sure routers are, specialisation of domains; unasked where there are routers",
        "Wang et al. 2024, arXiv:2408.15664; Xue et al. 2024, arXiv:2402.01739",
        unasked=True,
    ),
}


PASSES: dict[str, Entry] = {
    "magnitude": Entry(
        "leanmill.sparse.magnitude.config:Magnitude",
        "one-shot: keep the weights of largest magnitude",
        "Han et al. 2015, arXiv:1506.02626",
    ),
    "wanda": Entry(
        "leanmill.sparse.wanda.config:Wanda",
        "one-shot: keep the weights of largest magnitude times input norm",
        "Sun et al. 2023, arXiv:2306.11695",
    ),
    "sparsegpt": Entry(
        "leanmill.sparse.sparsegpt.config:SparseGpt",
        "one-shot: prune by second-order loss and correct the survivors",
        "Frantar and Alistarh 2023, arXiv:2301.00774",
    ),
    "mfac": Entry(
        "leanmill.sparse.mfac.config:MFac",
        "one-shot: prune by the loss's curvature, from a few gradients, and correct the survivors",
        "Frantar et al. 2021, arXiv:2107.03356",
    ),
    "gptq": Entry(
        "leanmill.quant.gptq.config:Gptq",
        "one-shot: round columns in turn and correct the later ones",
        "Frantar et al. 2022, arXiv:2210.17323",
    ),
    "rtn": Entry(
        "leanmill.quant.rtn.config:Rtn",
        "one-shot: round every weight to the nearest level",
        "Jacob et al. 2018, arXiv:1712.05877",
    ),
    "squeezellm": Entry(
        "leanmill.quant.squeezellm.config:SqueezeLlm",
        "one-shot: levels of each row by k-means over its weights, counted by their squared gradients",
        "Kim et al. 2023, arXiv:2306.07629",
    ),
    "outliers": Entry(
        "leanmill.peft_ext.lisa.config:Outliers",
        "counts the weights that stand out in each block, by which lisa may draw (OwLore); changes nothing",
        "Li et al. 2024, arXiv:2405.18380; Yin et al. 2023, arXiv:2310.05175",
    ),
    "lq_lora": Entry(
        "leanmill.peft_ext.lq_lora.config:LqLora",
        "one-shot: weights of 2 to 8 bits and an adapter with what they lack, bits by an integer program",
        "Guo et al. 2023, arXiv:2311.12023",
    ),
    "cbq": Entry(
        "leanmill.quant.cbq.config:Cbq",
        "one-shot: steps and roundings of several blocks, trained together on what the blocks compute",
        "Ding et al. 2025, arXiv:2312.07950",
    ),
    "minitron": Entry(
        "leanmill.sparse.minitron.config:Minitron",
        "surgery: fewer channels, heads, neurons and layers, by what flows through them",
        "Muralidharan et al. 2024, arXiv:2407.14679; Michel et al. 2019, arXiv:1905.10650",
    ),
    "flap": Entry(
        "leanmill.sparse.flap.config:Flap",
        "surgery: fewer heads and neurons, those that fluctuate least, biases in their place",
        "An et al. 2023, arXiv:2312.11983",
    ),
    "slicegpt": Entry(
        "leanmill.sparse.slicegpt.config:SliceGpt",
        "surgery: fewer channels, after a rotation of the residual stream to its principal components",
        "Ashkboos et al. 2024, arXiv:2401.15024",
    ),
    "lolcats": Entry(
        "leanmill.architecture.lolcats.config:Lolcats",
        "surgery: linear attention behind a window of softmax, taught what attention put out (Hedgehog maps)",
        "Zhang et al. 2024, arXiv:2410.10254",
    ),
    "mha2mla": Entry(
        "leanmill.architecture.mha2mla.config:Mha2Mla",
        "surgery: latent attention with a few rotary frequencies of each head, the rest factored with the values",
        "Ji et al. 2025, arXiv:2502.14837",
    ),
    "transmla": Entry(
        "leanmill.architecture.transmla.config:TransMla",
        "surgery: latent attention in the place of grouped-query attention, for a smaller cache",
        "Meng et al. 2025, arXiv:2502.07864",
    ),
    "cfsp": Entry(
        "leanmill.sparse.cfsp.config:Cfsp",
        "surgery: fewer neurons, blocks that change their input less losing more",
        "Wang et al. 2024, arXiv:2409.13199",
    ),
    "adapt_pruner": Entry(
        "leanmill.sparse.adapt_pruner.config:AdaptPruner",
        "surgery: a few heads and neurons less, by the loss, more in layers that do little; takes turns with training",
        "Pan et al. 2025, arXiv:2502.03460",
    ),
    "ziplm": Entry(
        "leanmill.sparse.ziplm.config:ZipLm",
        "surgery: fewer heads and neurons by second-order error, under a speedup by measured latencies",
        "Kurtic et al. 2023, arXiv:2302.04089",
    ),
    "puzzle": Entry(
        "leanmill.sparse.puzzle.config:Puzzle",
        "surgery: attention and MLP of each layer by an integer program over distilled alternatives, under budgets",
        "Bercovich et al. 2024, arXiv:2411.19146",
    ),
    "remove_zeros": Entry(
        "leanmill.sparse.remove_zeros.config:RemoveZeros",
        "surgery: no heads and neurons whose weights are zero; the model computes the same",
        "Zhang et al. 2023, arXiv:2305.18403",
    ),
    "drop_blocks": Entry(
        "leanmill.sparse.drop_blocks.config:DropBlocks",
        "surgery: no blocks, attention or MLPs that do little: by block influence (ShortGPT), or greedily (FinerCut)",
        "Men et al. 2024, arXiv:2403.03853; Zhang et al. 2024, arXiv:2405.18218",
    ),
    "welore": Entry(
        "leanmill.peft_ext.welore.config:WeLore",
        "surgery: weights with few large singular values become pairs of factors, by one threshold for all",
        "Jaiswal et al. 2024, arXiv:2407.11239",
    ),
    "share_blocks": Entry(
        "leanmill.sparse.share_blocks.config:ShareBlocks",
        "surgery: neighbouring blocks share attention and MLP, each with norms of its own (FoldGPT)",
        "Liu et al. 2024, arXiv:2407.00928",
    ),
    "evopress": Entry(
        "leanmill.search.evopress.config:EvoPress",
        "search: a level for each layer (sparsity, bits, dropped) under a budget, by evolution",
        "Sieberling et al. 2024, arXiv:2410.14649",
    ),
    "layer_budgets": Entry(
        "leanmill.search.layer_budgets.config:LayerBudgets",
        "search: a level for each layer under a budget, by dynamic programming over errors that add up",
        "Xu et al. 2023, arXiv:2308.10438; Frantar and Alistarh 2022, arXiv:2201.13096",
    ),
    "branch_merge": Entry(
        "leanmill.distill.branch_merge.config:BranchMerge",
        "merge: of models trained apart from one start, the weights of each that stand out",
        "Sun et al. 2025, arXiv:2503.04872",
    ),
    "upcycle": Entry(
        "leanmill.moe.upcycle.config:Upcycle",
        "surgery: a dense model becomes a mixture of experts that computes the same",
        "Komatsuzaki et al. 2022, arXiv:2212.05055; He et al. 2024, arXiv:2410.07524",
    ),
    "expert_upcycle": Entry(
        "leanmill.moe.upcycle.config:ExpertUpcycle",
        "surgery: a mixture of experts gets copies of its experts",
        "Dwivedi et al. 2026, arXiv:2604.19835",
    ),
    "mc_moe": Entry(
        "leanmill.moe.mc_moe.config:McMoe",
        "one-shot: experts of 1 to 3 bits, as an integer program shares them out, by GPTQ",
        "Huang et al. 2024, arXiv:2410.06270",
    ),
    "mix_n_match": Entry(
        "leanmill.moe.matformer.config:MixNMatch",
        "surgery: the first neurons of every MLP become a smaller model",
        "Devvrit et al. 2023, arXiv:2310.07707",
    ),
}
"""Passes of `leanmill compress`, by name."""
GROUP = "leanmill.techniques"
_of_plugins: dict[str, Entry] = {}


def known_techniques() -> dict[str, Entry]:
    """Return every technique: Leanmill's own, then those of installed packages and of loaded plugins.

    Raises:
        ConfigError: One of the latter takes a name of Leanmill's own.
    """
    others = {**_of_packages(), **_of_plugins}
    for name in others:
        _check_is_free(name, others[name].target)
    return {**TECHNIQUES, **others}


def load_plugin(module_name: str) -> None:
    """Import a module and add the techniques of its table `TECHNIQUES`.

    Raises:
        ConfigError: It cannot be imported, has no such table, or takes a name that is taken.
    """
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"plugins: {module_name!r} cannot be imported ({type(error).__name__}: {error}); install the package that "
            f"holds it, or put its folder on PYTHONPATH"
        ) from error
    table = getattr(module, "TECHNIQUES", None)
    if not isinstance(table, Mapping) or not all(isinstance(entry, Entry) for entry in table.values()):
        raise ConfigError(
            f"plugins: {module_name!r} has no table of techniques; give it TECHNIQUES = {{'name': "
            f"Entry('module:Class', 'summary', 'paper')}} with Entry from leanmill.core.registry"
        )
    for name, entry in table.items():
        _check_is_free(name, entry.target)
        _of_plugins[name] = entry


def _check_is_free(name: str, target: str) -> None:
    if name in TECHNIQUES:
        raise ConfigError(
            f"the technique {name!r} of a plugin ({target}) has a name of Leanmill's own; give it another name there"
        )


@functools.cache
def _of_packages() -> dict[str, Entry]:
    found = {}
    for point in importlib.metadata.entry_points(group=GROUP):
        package = point.dist
        source = f"from the package {package.name} {package.version}" if package else "from an installed package"
        found[point.name] = Entry(point.value, source, "see the package")
    return found


def technique_class(name: str) -> type[TechniqueConfig]:
    """Import and return the technique registered under `name`.

    Raises:
        ConfigError: No such technique; the message names the nearest known ones.
    """
    entry = TECHNIQUES.get(name) or known_techniques().get(name)
    if entry is None:
        known = known_techniques()
        near = near_names(name, known, count=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "run `leanmill methods` for the list"
        raise ConfigError(f"unknown technique type {name!r}; known: {', '.join(known)}; {hint}")
    return _import(entry)  # type: ignore[no-any-return]


def unasked_techniques() -> list[TechniqueConfig]:
    """Return the techniques that are installed without being listed, as they are by default."""
    return [_import(entry)() for entry in TECHNIQUES.values() if entry.unasked]


def _kind(value: Any) -> str:
    kinds = {type(None): "nothing", str: "text", bool: "true or false", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "a number")


def parse_technique(raw: Any) -> TechniqueConfig:
    """Turn one entry of a recipe's `techniques` list into its validated configuration."""
    if isinstance(raw, TechniqueConfig):
        return raw
    if not isinstance(raw, dict) or "type" not in raw:
        # What was given is not repeated: it may be anything, a credential too.
        given = "one without" if isinstance(raw, dict) else _kind(raw)
        raise ConfigError(f"a technique is a mapping with a `type`, got {given}; type e.g. {{type: ternary}}")
    if not isinstance(raw["type"], str):
        known = ", ".join(known_techniques())
        raise ConfigError(f"the `type` of a technique is a name, got {_kind(raw['type'])}; known types: {known}")
    return technique_class(raw["type"]).model_validate(raw)


def parse_pass(raw: Any) -> PassConfig:
    """Turn one entry of a compression recipe's `passes` into its validated configuration."""
    if isinstance(raw, PassConfig):
        return raw
    name = raw.get("type") if isinstance(raw, dict) else None
    if not isinstance(name, str):
        raise ConfigError(f"a pass is a mapping with a `type`; type e.g. {{type: wanda}}, known: {', '.join(PASSES)}")
    return pass_class(name).model_validate(raw)


def pass_class(name: str) -> type[PassConfig]:
    """Import and return the pass registered under `name`.

    Raises:
        ConfigError: No such pass; the message names the nearest known ones.
    """
    entry = PASSES.get(name)
    if entry is None:
        near = near_names(name, PASSES, count=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(PASSES)}"
        raise ConfigError(f"unknown pass {name!r}; {hint}")
    return _import(entry)  # type: ignore[no-any-return]


def _import(entry: Entry) -> Any:
    module_name, _, class_name = entry.target.partition(":")
    return getattr(importlib.import_module(module_name), class_name)
