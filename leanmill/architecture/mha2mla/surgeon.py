"""The model with a latent, written from what its queries and keys are like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanmill.core.errors import ConfigError, RunError
from leanmill.core.llama_like import check_family, completed, own_config
from leanmill.core.surgery import CalibratedModel, LookingSurgeon, StoredBlock


_FAMILIES = ("llama", "mistral", "qwen2")
"""Whose attention has no norms of queries and keys, which nothing could be factored through."""
_OWN = "latent_llama"
"""Of Leanmill's own; see `leanmill.models.latent_llama`."""
_KEYS, _VALUES, _QUERIES = "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    layers: int
    heads: int
    groups: int
    head_dim: int


class Mha2MlaSurgeon(LookingSurgeon):
    """Turns grouped-query attention into latent attention; see `Mha2Mla`.

    Args:
        rank: Numbers of the latent.
        rope_dim: Numbers of a key that stay rotary.
        frequencies: Which.
    """

    def __init__(
        self, *, rank: int, rope_dim: int, frequencies: Literal["contribution", "high", "low", "uniform"]
    ) -> None:
        self.rank, self.rope_dim, self.frequencies = rank, rope_dim, frequencies
        self._before: Any = None
        self._after: Any = None
        self._lost: list[tuple[float, float]] = []

    def config(self, before: Any) -> Any:
        check_family("mha2mla", before, _FAMILIES, "latent attention")
        self._before, self.sizes = before, _sizes(before)
        most = min(before.hidden_size, self.sizes.groups * (2 * self.sizes.head_dim - self.rope_dim))
        if self.rank > most:
            raise ConfigError(
                f"mha2mla: kv_lora_rank={self.rank} is more than there is to hold here, {most}; give at most that"
            )
        kept = [[self._fixed()] * self.sizes.groups] * self.sizes.layers
        return self._take(kept)

    def _fixed(self) -> list[int]:
        """The frequencies of every head, where they are chosen by their number."""
        number, kept = self.sizes.head_dim // 2, self.rope_dim // 2
        if self.frequencies == "low":
            return list(range(max(0, number - kept), number))
        if self.frequencies == "uniform":
            if number % kept:
                raise ConfigError(
                    f"mha2mla: frequencies: uniform takes every so many, and rope_head_dim={self.rope_dim} does not "
                    f"divide the size of a head, {self.sizes.head_dim}; give one that does"
                )
            return list(range(0, number, number // kept))
        return list(range(kept))

    def _take(self, kept: list[list[list[int]]]) -> Any:
        self._after = own_config(
            "mha2mla",
            _OWN,
            self._before,
            head_dim=self.sizes.head_dim,
            kv_lora_rank=self.rank,
            rope_head_dim=self.rope_dim,
            rotary_frequencies=kept,
        )
        return self._after

    def look(self, model: CalibratedModel) -> Any:
        kept = []
        for block in model.blocks():
            sums = {name: _Norms(self.sizes.head_dim) for name in (_QUERIES, _KEYS)}
            hooks = [block.module.get_submodule(name).register_forward_hook(one.see) for name, one in sums.items()]
            for _ in block.run():
                pass
            for hook in hooks:
                hook.remove()
            queries, keys = (one.mean(model) for one in sums.values())
            contribution = (queries.view(self.sizes.groups, -1, queries.shape[-1]) * keys[:, None]).sum(1)
            if not torch.isfinite(contribution).all():
                raise RunError(
                    f"mha2mla: queries and keys of layer {block.index} are not finite on the calibration rows; look at "
                    f"the data"
                )
            highest = contribution.argsort(dim=-1, descending=True, stable=True)[:, : self.rope_dim // 2]
            kept.append(highest.sort(-1).values.tolist())
        return self._take(kept)

    def block(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        attention = dict(self._attention(block))
        dtype = block.read(f"{_QUERIES}.weight").dtype
        yield from ((name, tensor.to(dtype).contiguous()) for name, tensor in attention.items())
        gone = tuple(f"{name}." for name in (_QUERIES, _KEYS, _VALUES))
        kept = ((name, block.read(name)) for name in sorted(block.names) if not name.startswith(gone))
        yield from completed(self._after, self._after.hidden_size, kept)

    def _attention(self, block: StoredBlock) -> Iterator[tuple[str, Tensor]]:
        kept = torch.tensor(self._after.rotary_frequencies[block.index])
        rotary, others = _rows(kept, self.sizes.head_dim)
        of_queries = torch.cat([rotary, others], dim=1).repeat_interleave(self.sizes.heads // self.sizes.groups, dim=0)
        for suffix in ("weight", "bias"):
            if f"{_QUERIES}.{suffix}" not in block.names:
                continue
            yield f"{_QUERIES}.{suffix}", self._queries(block.read(f"{_QUERIES}.{suffix}"), of_queries)
            yield f"self_attn.k_rope_proj.{suffix}", _taken(block.read(f"{_KEYS}.{suffix}"), rotary)
        key_bias, value_bias = f"{_KEYS}.bias", f"{_VALUES}.bias"
        if key_bias in block.names:
            yield "self_attn.k_up_proj.bias", _taken(block.read(key_bias), others)
            yield "self_attn.v_up_proj.bias", block.read(value_bias)
        keys = _taken(block.read(f"{_KEYS}.weight"), others).double()
        values = block.read(f"{_VALUES}.weight").double()
        down, up, lost = joint_svd(torch.cat([keys, values]), self.rank)
        self._lost.append(lost)
        yield "self_attn.kv_down_proj.weight", down
        yield "self_attn.k_up_proj.weight", up[: len(keys)]
        yield "self_attn.v_up_proj.weight", up[len(keys) :]

    def _queries(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """Rows in their new order; those that no longer turn keep what cosines and sines scale scores by (YaRN)."""
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        by_head = _taken(tensor, rows).double().unflatten(0, (self.sizes.heads, -1))
        by_head[:, self.rope_dim :] *= LlamaRotaryEmbedding(self._after).attention_scaling ** 2
        return by_head.flatten(0, 1)

    def describe(self) -> str:
        sizes = self.sizes
        lost = sum(lost for lost, _ in self._lost) / max(1e-300, sum(whole for _, whole in self._lost))
        before, after = 2 * sizes.groups * sizes.head_dim, self.rank + sizes.groups * self.rope_dim
        width = self._before.dtype.itemsize if isinstance(self._before.dtype, torch.dtype) else 4
        return (
            f"{self.rope_dim} of {sizes.head_dim} numbers of each key stay rotary ({self.frequencies}); a latent of "
            f"{self.rank} loses {lost:.2%} of the energy of the other keys' and the values' weights; a cache keeps "
            f"{after} numbers a token and layer in place of {before}, {width * after * sizes.layers:,} bytes a "
            f"token in place of {width * before * sizes.layers:,}"
        )


class _Norms:
    """Sums over tokens of the norm of each pair that RoPE rotates together, by head."""

    def __init__(self, head_dim: int) -> None:
        self.half = head_dim // 2
        self.sums: Tensor | None = None
        self.number = 0

    def see(self, _: nn.Module, __: Any, output: Tensor) -> None:
        """Look at what a projection puts out [B, S, heads x head_dim]; biases are in it, rotations change no norm."""
        pairs = output.detach().float().flatten(0, 1).unflatten(-1, (-1, 2, self.half))
        found = pairs.norm(dim=2).double().sum(0).cpu()
        self.sums = found if self.sums is None else self.sums + found
        self.number += len(pairs)

    def mean(self, model: CalibratedModel) -> Tensor:
        """Return the mean over all ranks' tokens [heads, head_dim / 2] fp64; a collective."""
        assert self.sums is not None
        return model.total(self.sums) / model.total(torch.tensor(float(self.number), dtype=torch.float64))


def joint_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Factor a weight by the largest singular values, which the authors leave with what makes outputs.

    Args:
        weight: [out, in] fp64.
        rank: Of the product.

    Returns:
        What makes the latent [rank, in], orthonormal rows; what reads it [out, rank]; squared norms of what is lost and
        of the whole.
    """
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    energies = values.square()
    return right[:rank], left[:, :rank] * values[:rank], (float(energies[rank:].sum()), float(energies.sum()))


def _rows(kept: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Rows of a head that stay rotary and those that do not, of each key-value head [groups, n] in RoPE's layout."""
    half = head_dim // 2
    is_kept = torch.zeros(len(kept), half, dtype=torch.bool).scatter_(1, kept, value=True)
    others = torch.arange(half).expand(len(kept), -1)[~is_kept].view(len(kept), -1)
    return torch.cat([kept, kept + half], dim=1), torch.cat([others, others + half], dim=1)


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    """Rows of each head [heads, n] of a projection's weight or bias [heads x head_dim, ...]."""
    by_head = tensor.unflatten(0, (len(rows), -1))
    return torch.cat([own[index] for own, index in zip(by_head, rows, strict=True)])


def _sizes(before: Any) -> _Sizes:
    heads = before.num_attention_heads
    return _Sizes(
        layers=before.num_hidden_layers,
        heads=heads,
        groups=before.num_key_value_heads,
        head_dim=getattr(before, "head_dim", None) or before.hidden_size // heads,
    )
