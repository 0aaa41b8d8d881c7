"""The model with latent attention, written from what its attention sees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanmill.architecture.transmla.latent import Inputs, Latent, latent_of
from leanmill.architecture.transmla.rotation import Rotation, rotation_of
from leanmill.core.errors import ConfigError, RunError
from leanmill.core.gram import Gram
from leanmill.core.llama_like import check_family
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock


_FAMILIES = ("llama", "mistral", "qwen2")
"""Whose attention has no norms of queries and keys, which nothing could be rotated or projected through."""
_ROTARY = ("default", "linear", "llama3")
"""Kinds of RoPE each of whose frequencies depends on nothing but the unscaled one, so that a shorter table is part of a
longer one."""
_COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "dtype",
)
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class _Plan:
    layers: int
    heads: int
    groups: int
    """Key-value heads."""
    head_dim: int
    rope_dim: int
    fold: int
    kv_rank: int
    q_rank: int | None

    @property
    def scale(self) -> float:
        """Of queries, since attention divides by the root of what queries and keys are long, which has grown."""
        return math.sqrt((self.head_dim + self.rope_dim) / self.head_dim)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What becomes of one layer's attention."""

    rotation: Rotation
    keys_and_values: Latent
    """Of the keys that are not rotary, over `key_scale`, and the values."""
    key_scale: float
    queries: Latent | None


class TransMlaSurgeon(LookingSurgeon):
    """Turns grouped-query attention into latent attention; see `TransMla`.

    Args:
        kv_rank: Numbers of the latent of keys and values.
        rope_dim: Of the shared rotary part; None is the size of a head.
        fold: Frequencies that count as one; None is the size of a head over `rope_dim`.
        q_rank: Numbers of the latent of queries; None is none.
        balance: Whether keys are scaled to the energy of values.
    """

    def __init__(
        self, *, kv_rank: int, rope_dim: int | None, fold: int | None, q_rank: int | None, balance: bool
    ) -> None:
        self.kv_rank, self.rope_dim, self.fold, self.q_rank, self.balance = kv_rank, rope_dim, fold, q_rank, balance
        self._plan: _Plan | None = None
        self._after: Any = None
        self.layers: list[LayerPlan] = []
        """Of each block."""

    @property
    def plan(self) -> _Plan:
        """What `config` found."""
        assert self._plan is not None
        return self._plan

    def config(self, before: Any) -> Any:
        _check_model(before)
        self._plan = plan = self._sizes(before)
        if plan.q_rank is None and _has_query_bias(before):
            raise ConfigError(
                f"transmla: queries of this {before.model_type} have biases, which deepseek_v3 has only through a "
                f"latent; give q_lora_rank, e.g. {plan.heads * plan.head_dim + 1}, which loses nothing"
            )
        self._after = _config_after(before, plan)
        return self._after

    def _sizes(self, before: Any) -> _Plan:
        heads, groups = before.num_attention_heads, before.num_key_value_heads
        head_dim = getattr(before, "head_dim", None) or before.hidden_size // heads
        rope_dim = self.rope_dim or head_dim
        if head_dim % rope_dim:
            raise ConfigError(
                f"transmla: qk_rope_head_dim={rope_dim} does not divide the size of a head, {head_dim}; give one that "
                f"does"
            )
        fold = self.fold or head_dim // rope_dim
        if (head_dim // 2) % fold or fold % (head_dim // rope_dim):
            raise ConfigError(
                f"transmla: frequency_fold={fold} is to divide the {head_dim // 2} frequencies of a head and be a "
                f"multiple of {head_dim // rope_dim}, the size of a head over qk_rope_head_dim; give e.g. "
                f"{head_dim // rope_dim}"
            )
        _check_rank("kv_lora_rank", self.kv_rank, 2 * groups * head_dim - rope_dim + 1)
        if self.q_rank is not None:
            _check_rank("q_lora_rank", self.q_rank, heads * head_dim + 1)
        return _Plan(
            layers=before.num_hidden_layers,
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            rope_dim=rope_dim,
            fold=fold,
            kv_rank=self.kv_rank,
            q_rank=self.q_rank,
        )

    def look(self, model: CalibratedModel) -> Any:
        self.layers = []
        for block in model.blocks():
            attention = block.module.get_submodule("self_attn")
            query = attention.get_submodule("q_proj")
            gram = Gram(self._after.hidden_size + 1, dtype=torch.float64)
            hook = query.register_forward_pre_hook(lambda _, inputs, gram=gram: _see(gram, inputs[0]))
            for _ in block.run():
                pass
            hook.remove()
            gram.reduce(model.total)
            rows = {name: _rows(dict(attention.get_submodule(name).named_parameters())) for name in _PROJECTIONS}
            self.layers.append(self._solve(rows, Inputs(gram.whole())))
        return self._after

    def _solve(self, rows: Mapping[str, Tensor], inputs: Inputs) -> LayerPlan:
        plan = self.plan
        if not torch.isfinite(inputs.gram).all():
            raise RunError("transmla: what enters attention is not finite on the calibration rows; look at the data")
        rotation = rotation_of(
            rows["k_proj"], inputs.gram, head_dim=plan.head_dim, fold=plan.fold, rope_dim=plan.rope_dim
        )
        keys, values = rotation.other_keys(rows["k_proj"])[:, :-1], rows["v_proj"][:, :-1]
        scale = 1.0
        if self.balance:
            of_keys, of_values = (float(torch.trace(w @ inputs.covariance @ w.t())) for w in (keys, values))
            # Where one of them is nothing (all keys rotary), nothing is to be balanced.
            scale = math.sqrt(of_keys / of_values) if of_keys > 1e-12 * of_values > 0 else 1.0
        return LayerPlan(
            rotation=rotation,
            keys_and_values=latent_of(torch.cat([keys / scale, values]), inputs, plan.kv_rank),
            key_scale=scale,
            queries=None if plan.q_rank is None else latent_of(rows["q_proj"][:, :-1], inputs, plan.q_rank),
        )

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        dtype = block.read("self_attn.q_proj.weight").dtype
        for name, tensor in self._attention(block):
            yield f"self_attn.{name}", tensor.to(dtype).contiguous()
        gone = tuple(f"self_attn.{name}." for name in _PROJECTIONS)
        output_bias = "self_attn.o_proj.bias"
        if output_bias not in block.names:
            yield output_bias, torch.zeros(self._after.hidden_size, dtype=dtype)
        yield from ((name, block.read(name)) for name in sorted(block.names) if not name.startswith(gone))

    def _attention(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        layer = self.layers[block.index]
        rows = {
            name: _rows({n: block.read(k) for n in ("weight", "bias") if (k := f"self_attn.{name}.{n}") in block.names})
            for name in _PROJECTIONS
        }
        yield from self._queries(rows["q_proj"], layer)
        yield from self._keys_and_values(rows["k_proj"], rows["v_proj"], layer)

    def _queries(self, rows: Tensor, layer: LayerPlan) -> Iterator[tuple[str, Tensor]]:
        def read(columns: Tensor) -> Tensor:
            own = columns.view(self.plan.heads, self.plan.head_dim, -1)
            both = torch.cat([own, layer.rotation.shared_queries(columns)], dim=1)
            return both.flatten(0, 1) * self.plan.scale

        latent = layer.queries
        if latent is None:
            yield "q_proj.weight", read(rows)[:, :-1]
            return
        yield "q_a_proj.weight", latent.down(rows[:, :-1])
        yield "q_a_proj.bias", latent.down_bias()
        yield "q_a_layernorm.weight", latent.norm_weight()
        yield "q_b_proj.weight", latent.up(read, rows[:, -1])

    def _keys_and_values(self, keys: Tensor, values: Tensor, layer: LayerPlan) -> Iterator[tuple[str, Tensor]]:
        plan, latent = self.plan, layer.keys_and_values

        def read(columns: Tensor) -> Tensor:
            of_groups = columns.view(2, plan.groups, plan.head_dim, -1)
            both = torch.cat([of_groups[0] * layer.key_scale, of_groups[1]], dim=1)
            return both.repeat_interleave(plan.heads // plan.groups, dim=0).flatten(0, 1)

        shared = layer.rotation.shared_keys(keys)
        rows = torch.cat([layer.rotation.other_keys(keys) / layer.key_scale, values])
        yield "kv_a_proj_with_mqa.weight", torch.cat([latent.down(rows[:, :-1]), shared[:, :-1]])
        yield "kv_a_proj_with_mqa.bias", torch.cat([latent.down_bias(), shared[:, -1]])
        yield "kv_a_layernorm.weight", latent.norm_weight()
        yield "kv_b_proj.weight", latent.up(read, rows[:, -1])

    def describe(self) -> str:
        plan = self.plan
        held = sum(layer.keys_and_values.captured for layer in self.layers) / len(self.layers)
        return (
            f"{plan.groups} key-value heads of {plan.head_dim} became a rotary part of {plan.rope_dim} and a latent of "
            f"{plan.kv_rank} that holds {held:.1%} of what is not rotary; a cache keeps {plan.rope_dim + plan.kv_rank} "
            f"numbers a token and layer in place of {2 * plan.groups * plan.head_dim}"
        )


def _see(gram: Gram, hidden: Tensor) -> None:
    rows = hidden.detach().flatten(0, -2).double().cpu()
    gram.add(torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1))


def _rows(parameters: Mapping[str, Tensor]) -> Tensor:
    """A projection's weight with its bias behind it [out, n + 1] fp64."""
    weight = parameters["weight"].detach().double().cpu()
    bias = parameters["bias"].detach().double().cpu() if "bias" in parameters else weight.new_zeros(len(weight))
    return torch.cat([weight, bias[:, None]], dim=1)


def _check_rank(name: str, given: int, most: int) -> None:
    if given > most:
        raise ConfigError(f"transmla: {name}={given} is more than there is to hold here, {most}; give at most that")


def _check_model(before: Any) -> None:
    check_family("transmla", before, _FAMILIES, "latent attention")
    if getattr(before, "mlp_bias", False):
        raise ConfigError(
            "transmla: the MLPs of this model have biases, which those of deepseek_v3 have not; give a model without "
            "mlp_bias"
        )
    kind = (before.rope_parameters or {}).get("rope_type", "default")
    if kind not in _ROTARY:
        raise ConfigError(
            f"transmla: RoPE of the kind {kind!r} has frequencies that depend on how many there are; give a model "
            f"whose rope_type is {', '.join(_ROTARY)}"
        )


def _has_query_bias(before: Any) -> bool:
    return bool(before.model_type == "qwen2" or getattr(before, "attention_bias", False))


def _config_after(before: Any, plan: _Plan) -> Any:
    from transformers import AutoConfig

    copied = {name: getattr(before, name) for name in _COPIED if hasattr(before, name)}
    return AutoConfig.for_model(
        "deepseek_v3",
        **copied,
        num_key_value_heads=plan.heads,
        q_lora_rank=plan.q_rank,
        kv_lora_rank=plan.kv_rank,
        qk_rope_head_dim=plan.rope_dim,
        qk_nope_head_dim=plan.head_dim,
        v_head_dim=plan.head_dim,
        rope_interleave=False,
        attention_bias=True,
        # No layer has experts.
        first_k_dense_replace=plan.layers,
        num_mtp_layers=0,
    )
